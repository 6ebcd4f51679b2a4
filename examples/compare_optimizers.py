# SPDX-License-Identifier: Apache-2.0
"""RMSProp beside its neighbours, on three surfaces and on the digits network.

    python examples/compare_optimizers.py
    python examples/compare_optimizers.py --epochs 20 --output runs/longer

Learning rates suit one optimizer and one task, so that each optimizer is tuned on each
task, by one compiled program that tries all learning rates at once. Tuning and report
use different data. On a surface, 16 points around the start are for tuning, and the
start is reported. On the digits, the validation loss of seeds 100 to 104 is for tuning,
and the test loss of seeds 0 to 4 is reported.

The output folder receives compare_optimizers.png, .gif and .json.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import command_line, digits, results, surfaces, sweep
from common import comparison_figures as figures
from tqdm import tqdm

import optax_rms

OPTIMIZERS = {
    "RMSProp": optax_rms.rmsprop,
    "RMSProp, centered": partial(optax_rms.rmsprop, centered=True),
    "RMSProp, momentum": partial(optax_rms.rmsprop, momentum=0.9),
    "Adam": optax.adam,
    "Adagrad": optax.adagrad,
    "Momentum": partial(optax.sgd, momentum=0.9),
}
NUM_STEPS = 200  # on a surface, where the slowest takes half as many
TUNING_SEEDS = (100, 101, 102, 103, 104)
SEEDS = (0, 1, 2, 3, 4)

MakeOptimizer = Callable[..., optax.GradientTransformation]


def main(argv: list[str] | None = None) -> None:
    make_parser().run(compare, argv)


def compare(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    surface_rates = np.logspace(-4, 2, 13 if args.quick else 61)
    digits_rates = np.logspace(-5, 1, 7 if args.quick else 25)
    examples = sweep.load()
    on_surfaces, on_digits, paths = {}, {}, {}
    with tqdm(OPTIMIZERS.items(), bar_format="{l_bar}{bar}| {elapsed}") as progress:
        for name, make in progress:
            progress.set_description(name)
            on_surfaces[name], paths[name] = run_on_surfaces(make, surface_rates)
            on_digits[name] = run_on_digits(make, digits_rates, examples, args.epochs)

    stem = args.output / "compare_optimizers"
    num_frames = 6 if args.quick else 60
    figures.draw_figure(on_surfaces, on_digits, paths, stem.with_suffix(".png"))
    figures.draw_animation(paths, num_frames, stem.with_suffix(".gif"))
    measured = {"epochs": args.epochs, "surfaces": on_surfaces, "digits": on_digits}
    results.save(stem.with_suffix(".json"), args.command, measured)
    print_table(on_surfaces, on_digits)
    print(f"{stem.name}.png, .gif and .json are in {args.output}")


def run_on_surfaces(
    make: MakeOptimizer, learning_rates: np.ndarray
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The best learning rate, and the path `[steps + 1, 2]`, by name of surface."""
    offsets = 0.1 * np.random.default_rng(0).normal(size=(17, 2))
    offsets[0] = 0  # the reported start; the other 16 are for tuning

    def run(learning_rate: jax.Array, offset: jax.Array) -> list[Any]:
        paths = [
            surfaces.descend(
                make(learning_rate),
                surface,
                jnp.asarray(surface.start) + offset,
                NUM_STEPS,
            )
            for surface in surfaces.ALL
        ]
        steps = map(surfaces.num_steps_to_settle, surfaces.ALL, paths)
        return list(zip(steps, paths, strict=True))

    run_all = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
    runs = jax.tree.map(
        np.asarray,
        run_all(learning_rates.astype(np.float32), offsets.astype(np.float32)),
    )
    found, paths = {}, {}
    for surface, (num_steps, path) in zip(surfaces.ALL, runs, strict=True):
        best = least(np.mean(num_steps[:, 1:], axis=1))
        paths[surface.name] = path[best, 0, : num_steps[best, 0] + 1]
        found[surface.name] = chosen(learning_rates, best) | {
            "num_steps": int(num_steps[best, 0])
        }
    return found, paths


def run_on_digits(
    make: MakeOptimizer,
    learning_rates: np.ndarray,
    examples: list[digits.Examples],
    epochs: int,
) -> dict[str, Any]:
    """The best learning rate, and the test losses of all learning rates."""
    training, validation, test = examples
    rates, seeds = np.meshgrid(learning_rates, TUNING_SEEDS + SEEDS, indexing="ij")
    states, keys = sweep.start(
        make, {"learning_rate": rates.ravel()}, seeds.ravel(), training.images.shape[1]
    )
    for _ in range(epochs):
        states, _ = sweep.train_epoch(states, keys, training, validation)
    val_loss, _ = sweep.evaluate(states.params, validation)
    tuning = np.asarray(val_loss).reshape(rates.shape)[:, : len(TUNING_SEEDS)]
    best = least(tuning.mean(axis=1))
    loss, accuracy = (
        np.asarray(values).reshape(rates.shape)[:, len(TUNING_SEEDS) :]
        for values in sweep.evaluate(states.params, test)
    )
    return chosen(learning_rates, best) | {
        "test_loss": results.as_json(loss[best]),
        "test_accuracy": accuracy[best].tolist(),
        "learning_rates": learning_rates.tolist(),
        "tuning_loss_of_learning_rates": results.as_json(tuning),
        "test_loss_of_learning_rates": results.as_json(loss),
    }


def least(losses: np.ndarray) -> int:
    """The index of the lowest loss; losses that are not finite come last."""
    return int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))


def chosen(learning_rates: np.ndarray, index: int) -> dict[str, Any]:
    return {
        "learning_rate": float(learning_rates[index]),
        "at_edge_of_grid": index in (0, len(learning_rates) - 1),
    }


def print_table(on_surfaces: figures.Results, on_digits: figures.Results) -> None:
    """One row per optimizer; `*` marks a learning rate at the edge of its grid."""

    def rate(found: dict[str, Any]) -> str:
        return f"{found['learning_rate']:.2g}{'*' * found['at_edge_of_grid']}"

    tasks = [surface.name for surface in surfaces.ALL]
    print(" " * 18 + "".join(f"{task:>19}" for task in tasks) + f"{'Digits':>37}")
    print(
        " " * 18
        + f"{'rate':>11}{'steps':>8}" * len(tasks)
        + f"{'rate':>11}{'test loss':>17}{'accuracy':>10}"
    )
    for name in OPTIMIZERS:
        row = f"{name:18}"
        for task in tasks:
            found = on_surfaces[name][task]
            row += f"{rate(found):>11}{found['num_steps']:8}"
        found = on_digits[name]
        accuracy = np.mean(found["test_accuracy"])
        loss = np.array(found["test_loss"], dtype=float)
        spread = f"{loss.mean():.3f} ± {loss.std():.3f}"
        print(row + f"{rate(found):>11}{spread:>17}{accuracy:>10.1%}")


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, output="runs/compare")
    add = parser.add_argument
    add("--epochs", type=command_line.count(), default=10, help="on the digits")
    add("--quick", action="store_true", help="far fewer learning rates and frames")
    return parser


if __name__ == "__main__":
    main()
