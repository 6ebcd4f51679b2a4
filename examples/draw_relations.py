# SPDX-License-Identifier: Apache-2.0
"""Draws how RMSProp, Adam, Adagrad, momentum and sign descent are related.

    python examples/draw_relations.py
    python examples/draw_relations.py --output docs/images

Each optimizer divides an average of the gradient by the root of an average of the
square. The two averages of an optimizer reach back over one step, over recent steps or
over all steps, and this alone makes the difference. The output folder receives
relations.png.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import command_line, surfaces
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

import optax_rms

NUM_STEPS = 300
AGES = np.arange(16)
BLUE, ORANGE = "#0072B2", "#E69F00"
FORMULA = (
    r"step $\propto\ \frac{\mathrm{average\ of}\ g}{\sqrt{\mathrm{average\ of}\ g^2}}$"
)


class Cell(NamedTuple):
    """An optimizer, and its place in the grid of `NUMERATORS` and `DENOMINATORS`."""

    row: int
    column: int
    name: str
    note: str
    make: Callable[[jax.Array], optax.GradientTransformation]


class Average(NamedTuple):
    """The steps that an average covers, the setting, and the weights of past steps."""

    covers: str
    setting: str
    weights: np.ndarray


ADAGRAD = partial(optax.adagrad, initial_accumulator_value=0.0)
LATEST, RECENT, ALL, NONE = (AGES == 0), 0.85**AGES, AGES >= 0, AGES < 0
NUMERATORS = (
    Average("the last g", "b1 = 0", LATEST),
    Average("recent g", "0 < b1 < 1", RECENT),
)
DENOMINATORS = (
    Average("the last g²", "decay = 0", LATEST),
    Average("recent g²", "0 < decay < 1", RECENT),
    Average("every g² alike", "decay = 1 - 1/t", ALL),
    Average("no g², a constant", "decay = 1", NONE),
)
CELLS = (
    Cell(0, 0, "Sign descent", "", partial(optax_rms.rmsprop, decay=0.0)),
    Cell(0, 1, "RMSProp", "", optax_rms.rmsprop),
    Cell(0, 2, "Adagrad", "learning rate / √t", ADAGRAD),
    Cell(0, 3, "Gradient descent", "", optax.sgd),
    Cell(1, 1, "Adam", "bias-corrected", optax.adam),
    Cell(1, 3, "Momentum", "", partial(optax.sgd, momentum=0.9)),
)


def main(argv: list[str] | None = None) -> None:
    command_line.Parser(__file__, __doc__, output="runs/relations").run(run, argv)


def run(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "relations.png")
    print(f"relations.png is in {args.output}")


def draw(file: Path) -> None:
    figure = Figure(figsize=(13, 5.6), layout=ConstrainedLayoutEngine(w_pad=0.1))
    ratios = {"height_ratios": [0.45, 1, 1], "width_ratios": [0.55, 1, 1, 1, 1]}
    grid = figure.subplots(3, 5, gridspec_kw=ratios)
    for axes in grid.ravel():
        axes.set_axis_off()
    averages = zip([*grid[0, 1:], *grid[1:, 0]], DENOMINATORS + NUMERATORS, strict=True)
    for axes, average in averages:
        draw_weights(axes, average)
    write = partial(grid[0, 0].text, 0.5, ha="center", va="center")
    write(0.8, FORMULA, fontsize=17)
    write(0.1, "bars: weights in the average,\nthe latest on the right", color="0.4")
    for cell in CELLS:
        axes = grid[1 + cell.row, 1 + cell.column]
        axes.set_axis_on()
        surfaces.draw(axes, surfaces.RAVINE)
        axes.plot(*best_path(cell.make).T, marker=".", markersize=4, color=BLUE)
        axes.set_title(cell.name, loc="left", fontweight="bold", fontsize=13)
        axes.set_title(cell.note, loc="right", color="0.4", fontsize=11)
    figure.savefig(file, dpi=110)


def draw_weights(axes: Axes, average: Average) -> None:
    axes.bar(-AGES, average.weights, width=0.7, color=ORANGE)
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set(ylim=(0, 1), box_aspect=0.35)
    axes.set_title(average.covers, fontsize=13, fontweight="bold")
    below = {"transform": axes.transAxes, "ha": "center", "va": "top"}
    axes.text(0.5, -0.1, average.setting, fontsize=12, **below)


def best_path(
    make: Callable[[jax.Array], optax.GradientTransformation],
) -> np.ndarray:
    """The path down the ravine that settles in the fewest steps."""

    def run(learning_rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = jnp.asarray(surfaces.RAVINE.start)
        path = surfaces.descend(make(learning_rate), surfaces.RAVINE, start, NUM_STEPS)
        return surfaces.num_steps_to_settle(surfaces.RAVINE, path), path

    num_steps, paths = jax.jit(jax.vmap(run))(jnp.logspace(-3, 1, 81))
    best = int(np.argmin(num_steps))
    return np.asarray(paths[best, : num_steps[best] + 1])


if __name__ == "__main__":
    main()
