# SPDX-License-Identifier: Apache-2.0
"""Trains the digits network with 64 learning rates, 4 decays and 3 seeds at once.

    python examples/learning_rate_sweep.py
    python examples/learning_rate_sweep.py --epochs 20 --output runs/longer

One compiled program trains all 768 networks. For comparison of the times, 16 networks
are trained a second time, one after another, by the same code compiled for one network.
The output folder receives learning_rate_sweep.png, the heat map of the
final validation loss, and learning_rate_sweep.json.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from common import command_line, digits, results, sweep
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from tqdm import tqdm

import optax_rms

DECAYS = (0.0, 0.9, 0.99, 0.999)
SEEDS = (0, 1, 2)


def main(argv: list[str] | None = None) -> None:
    make_parser().run(run, argv)


def run(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    learning_rates = np.logspace(-5, 0, 8 if args.quick else 64)
    grid = np.meshgrid(DECAYS, learning_rates, SEEDS, indexing="ij")
    losses, times = train(
        *grid, epochs=args.epochs, num_in_turn=2 if args.quick else 16
    )
    mean_loss = losses.mean(axis=-1)

    stem = args.output / "learning_rate_sweep"
    draw(learning_rates, mean_loss, stem.with_suffix(".png"))
    measured = {
        "epochs": args.epochs,
        "batch_size": sweep.BATCH_SIZE,
        "seeds": SEEDS,
        "times": times,
        "decays": DECAYS,
        "learning_rates": learning_rates.tolist(),
        "val_loss": results.as_json(mean_loss),
    }
    results.save(stem.with_suffix(".json"), args.command, measured)
    print_times(times)
    print(f"{stem.name}.png and .json are in {args.output}")


def train(
    decay: np.ndarray,
    learning_rate: np.ndarray,
    seed: np.ndarray,
    *,
    epochs: int,
    num_in_turn: int,
) -> tuple[np.ndarray, dict[str, float]]:
    """Final validation losses, in the shape of the arguments, and times in seconds.

    Some runs, spread evenly, are trained again one after another. An epoch of all runs
    at once and an epoch of these runs alternate, so that other work on the machine
    lengthens both times alike.
    """
    training, validation, _ = sweep.load()
    states, keys = sweep.start(
        optax_rms.rmsprop,
        {"decay": decay.ravel(), "learning_rate": learning_rate.ravel()},
        seed.ravel(),
        training.images.shape[1],
    )
    in_turn = [
        (jax.tree.map(lambda leaf, i=i: leaf[i], states), keys[i])
        for i in np.linspace(0, seed.size - 1, num_in_turn).astype(int)
    ]
    epoch_of_one = jax.jit(
        partial(digits.train_epoch, batch_size=sweep.BATCH_SIZE), donate_argnums=0
    )
    epoch_of_all, compile_all = timed(
        sweep.train_epoch.lower(states, keys, training, validation).compile
    )
    epoch_of_one, compile_one = timed(
        epoch_of_one.lower(*in_turn[0], training, validation).compile
    )
    train_all = train_in_turn = 0.0
    for _ in tqdm(range(epochs), unit="epoch"):
        (states, _), seconds = timed(epoch_of_all, states, keys, training, validation)
        train_all += seconds
        for i, (state, key) in enumerate(in_turn):
            (state, _), seconds = timed(epoch_of_one, state, key, training, validation)
            in_turn[i] = state, key
            train_in_turn += seconds

    loss, _ = sweep.evaluate(states.params, validation)
    times = {
        "num_runs": seed.size,
        "num_in_turn": num_in_turn,
        "compile_all": compile_all,
        "compile_one": compile_one,
        "train_all": train_all,
        "train_in_turn": train_in_turn,
    }
    return np.asarray(loss).reshape(seed.shape), times


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result of a call and its duration in seconds."""
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - begin


def draw(learning_rates: np.ndarray, loss: np.ndarray, file: Path) -> None:
    """The heat map of the loss `[decays, learning_rates]`; rings mark the lowest."""
    guessing = math.log(10)  # the loss where all digits are equally likely
    colors = matplotlib.colormaps["viridis_r"].with_extremes(bad="0.88", over="0.88")
    exponents = np.log10(learning_rates)
    half = (exponents[1] - exponents[0]) / 2

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        loss,
        aspect="auto",
        interpolation="nearest",
        extent=(exponents[0] - half, exponents[-1] + half, len(DECAYS) - 0.5, -0.5),
        cmap=colors,
        norm=LogNorm(0.04, guessing),
    )
    beside = partial(
        axes.text, 1.012, transform=axes.get_yaxis_transform(), va="center"
    )
    beside(-0.7, "lowest")
    for row, losses in enumerate(loss):
        best = np.nanargmin(losses)
        axes.plot(exponents[best], row, "o", mfc="none", mec="black", ms=9, mew=1.5)
        beside(row, f"{losses[best]:.3f}")
        axes.axhline(row + 0.5, color="white", linewidth=4)
    decades = np.arange(math.ceil(exponents[0]), math.floor(exponents[-1]) + 1)
    axes.set_xticks(decades, [f"$10^{{{decade}}}$" for decade in decades])
    axes.set_yticks(range(len(DECAYS)), [f"{decay:g}" for decay in DECAYS])
    axes.tick_params(left=False)
    axes.set(xlabel="learning rate", ylabel="decay")
    axes.set_title(
        f"Validation loss of RMSProp, mean of {len(SEEDS)} seeds",
        loc="left",
        fontweight="bold",
    )
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, extend="max", extendfrac=0.1, aspect=12, pad=0.02)
    ticks = [0.05, 0.1, 0.2, 0.5, 1]
    bar.set_ticks([*ticks, guessing], labels=[*map(str, ticks), "guessing"])
    bar.outline.set_visible(False)
    figure.savefig(file, dpi=120)


def print_times(times: dict[str, float]) -> None:
    num_runs, num_in_turn = times["num_runs"], times["num_in_turn"]
    compile_all, train_all = times["compile_all"], times["train_all"]
    compile_one = times["compile_one"]
    train_each = num_runs / num_in_turn * times["train_in_turn"]
    note = f"extrapolated from {num_in_turn} of them"
    print(f"{num_runs:3} networks         compile       train")
    print(f"all at once       {compile_all:8.1f} s {train_all:9.1f} s")
    print(f"one after another {compile_one:8.1f} s {train_each:9.1f} s  {note}")
    each_compiled = num_runs * compile_one + train_each
    print(
        f"All at once is {train_each / train_all:.1f} times as fast, compiling apart.\n"
        "With the learning rate as a Python number, each one is compiled anew: then it "
        f"is {each_compiled / (compile_all + train_all):.0f} times."
    )


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, output="runs/sweep")
    add = parser.add_argument
    add("--epochs", type=command_line.count(), default=10, help="of each network")
    add("--quick", action="store_true", help="8 learning rates only")
    return parser


if __name__ == "__main__":
    main()
