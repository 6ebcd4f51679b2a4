# SPDX-License-Identifier: Apache-2.0
"""The pictures of the documentation, drawn from result files."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import peers, stages
from benchmarks.update_step import COPY

# The colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLORS = {
    peers.OURS: "#0072B2",
    peers.UE6M2: "#56B4E9",
    peers.OPTAX: "#D55E00",
    peers.KERAS: "#CC79A7",
    peers.FOREACH: "#E69F00",
    peers.COMPILED: "#009E73",
    COPY: "#888888",
}
COPY_LABEL = "copy of as many bytes as float32 needs"

STYLES = {stages.ONE_SHAPE: "-", stages.ALL_DIFFERENT: ":"}

Rows = list[dict[str, Any]]


def growth(steps: dict[str, Any], before: dict[str, Any]) -> Figure:
    """Four panels: a step over parameters and leaves; tracing and compiling.

    Args:
      steps: measured by `benchmarks.growth`.
      before: measured by `benchmarks.stages`.
    """
    rows, total = steps["rows"], f"{steps['total']:,}"
    figure = Figure(figsize=(11, 8), layout="constrained", dpi=110)
    axes = figure.subplots(2, 2).ravel()
    panels = [
        ("One step, one leaf", "parameters", "elements"),
        (f"One step, {total} parameters", "leaves", "leaves"),
        ("Trace and lower", "leaves", "trace_and_lower"),
        ("Compile", "leaves", "compile"),
    ]
    for panel, (title, label, kind) in zip(axes, panels, strict=True):
        if kind in rows:
            _step_curves(panel, rows[kind])
        else:
            _stage_curves(panel, before["rows"], kind)
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
        panel.set_title(title, loc="left", fontweight="bold")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    sides = {row["side"] for row in rows["elements"] if "seconds" in row}
    shown = [side for side in COLORS if side in sides]
    handles = [_line(side) for side in shown]
    labels = [COPY_LABEL if side == COPY else side for side in shown]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _step_curves(axes: Axes, rows: Rows) -> None:
    for side, points in _by_side(rows).items():
        ns = [row["n"] for row in points]
        times = [row["seconds"] for row in points]
        _plot(
            axes, side, ns, [t["median"] for t in times], "--" if side == COPY else "-"
        )
        if side != COPY:
            lower, upper = (
                [t[f"{which}_quartile"] for t in times] for which in ("lower", "upper")
            )
            axes.fill_between(
                ns, lower, upper, color=COLORS[side], alpha=0.15, linewidth=0
            )


def _stage_curves(axes: Axes, rows: Rows, stage: str) -> None:
    for shapes, linestyle in STYLES.items():
        chosen = [row for row in rows if row["shapes"] == shapes]
        for side, points in _by_side(chosen).items():
            seconds = [row[stage]["median"] for row in points]
            _plot(axes, side, [row["n"] for row in points], seconds, linestyle)
    handles = [Line2D([], [], color="black", linestyle=s) for s in STYLES.values()]
    axes.legend(handles, ["leaves of one shape", "all shapes distinct"], frameon=False)


def _by_side(rows: Rows) -> dict[str, Rows]:
    measured = [row for row in rows if "not_measured" not in row]
    return {
        side: points
        for side in reversed(COLORS)
        if (points := [row for row in measured if row["side"] == side])
    }


def _plot(
    axes: Axes, side: str, ns: list[int], seconds: Sequence[float], linestyle: str
) -> None:
    marker = "" if side == COPY else "."
    axes.plot(ns, seconds, color=COLORS[side], linestyle=linestyle, marker=marker)


def _line(side: str) -> Line2D:
    return Line2D([], [], color=COLORS[side], linestyle="--" if side == COPY else "-")
