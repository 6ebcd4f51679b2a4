# SPDX-License-Identifier: Apache-2.0
"""The figure and the animation of `compare_optimizers.py`."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from . import surfaces

# The colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLORS = {
    "RMSProp": "#0072B2",
    "RMSProp, centered": "#56B4E9",
    "RMSProp, momentum": "#009E73",
    "Adam": "#D55E00",
    "Adagrad": "#CC79A7",
    "Momentum": "#E69F00",
}

# By the names of the optimizer and the surface.
Results = dict[str, dict[str, Any]]
Paths = dict[str, dict[str, np.ndarray]]


def draw_figure(
    on_surfaces: Results, on_digits: Results, paths: Paths, file: Path
) -> None:
    """Four panels: the paths over the surfaces, and how the digits were learned."""
    figure = Figure(figsize=(13, 6.5), layout="compressed")
    figure.suptitle("Each optimizer at the learning rate that suits it best", size=16)
    *maps, network = figure.subplots(2, 2).ravel()
    for axes, surface in zip(maps, surfaces.ALL, strict=True):
        surfaces.draw(axes, surface)
        for name, color in reversed(COLORS.items()):
            path = paths[name][surface.name].T
            outline = [withStroke(linewidth=3, foreground="white")]
            axes.plot(*path, color=color, linewidth=1.6, path_effects=outline)
            axes.plot(*path, ".", color=color, markersize=4)
        axes.set_title(surface.name, loc="left", fontsize=13, fontweight="bold")
        steps = {name: on_surfaces[name][surface.name]["num_steps"] for name in COLORS}
        _write_ranking(axes, "steps to stay in the circle", steps, steps, width=0.07)

    _draw_sensitivity(network, on_digits)
    network.set_title("Digits network", loc="left", fontsize=13, fontweight="bold")
    losses = {
        name: np.array(on_digits[name]["test_loss"], dtype=float) for name in COLORS
    }
    means = {name: loss.mean() for name, loss in losses.items()}
    texts = {name: f"{means[name]:.3f} ± {losses[name].std():.3f}" for name in COLORS}
    heading = "test loss at the large dot,\nmean ± deviation of 5 seeds"
    _write_ranking(network, heading, means, texts, width=0.38)
    figure.supxlabel(
        "Surfaces: from the white dot to a minimum, one dot per step. "
        "Network: mean and range of 5 seeds.",
        size=12,
        color="0.4",
    )
    figure.savefig(file, dpi=110, bbox_inches="tight", pad_inches=0.15)


def _draw_sensitivity(axes: Axes, on_digits: Results) -> None:
    for name, color in reversed(COLORS.items()):
        found = on_digits[name]
        rates = found["learning_rates"]
        losses = np.array(found["test_loss_of_learning_rates"], dtype=float)
        low, mean, high = losses.min(axis=1), losses.mean(axis=1), losses.max(axis=1)
        axes.fill_between(rates, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(rates, mean, color=color, linewidth=1.8)
        dot = found["learning_rate"], mean[rates.index(found["learning_rate"])]
        axes.plot(*dot, "o", color=color, mec="white", markersize=9, zorder=5)
    axes.set(xscale="log", yscale="log", ylim=(0.03, 3), box_aspect=1 / 1.4)
    axes.set(xlabel="learning rate", ylabel="test loss")
    axes.spines[["top", "right"]].set_visible(False)


def _write_ranking(
    axes: Axes, heading: str, values: dict, texts: dict, width: float
) -> None:
    """Writes the names beside the axes, lowest value first; it is the legend too."""
    write = partial(axes.text, transform=axes.transAxes, fontsize=11)
    write(1.05, 0.92, heading, color="0.4", linespacing=1.3)
    for row, name in enumerate(sorted(values, key=values.__getitem__)):
        style = {"y": 0.81 - 0.1 * row, "color": COLORS[name], "weight": "bold"}
        write(1.05 + width, s=texts[name], ha="right", **style)
        write(1.08 + width, s=name, **style)


def draw_animation(paths: Paths, num_frames: int, file: Path) -> None:
    """The optimizers walking down the surfaces, side by side."""
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    walkers = []
    maps = figure.subplots(1, len(surfaces.ALL))
    counter = maps[-1].set_title("step 0", loc="right", color="0.4")
    for axes, surface in zip(maps, surfaces.ALL, strict=True):
        surfaces.draw(axes, surface)
        axes.set_title(surface.name, loc="left", fontweight="bold")
        for name, color in reversed(COLORS.items()):
            (trail,) = axes.plot([], [], color=color, linewidth=1.6, alpha=0.7)
            (head,) = axes.plot([], [], "o", color=color, mec="white", ms=8, label=name)
            walkers.append((paths[name][surface.name], trail, head))
    figure.legend(
        handles=[head for _, _, head in walkers[: -len(COLORS) - 1 : -1]],
        loc="outside lower center",
        ncols=len(COLORS),
        frameon=False,
        handletextpad=0,
        columnspacing=1.2,
    )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # or it would be laid out anew for every frame

    def show(step: int) -> None:
        counter.set_text(f"step {step}")
        for path, trail, head in walkers:
            trail.set_data(*path[: step + 1].T)
            head.set_data(*path[: step + 1][-1:].T)

    last = max(len(path) for path, _, _ in walkers) - 1
    steps = np.linspace(0, last, num_frames).round().astype(int)
    pause = [last] * (num_frames // 6)
    animation = FuncAnimation(figure, show, [*steps, *pause])
    animation.save(file, PillowWriter(fps=10), dpi=80)
