# SPDX-License-Identifier: Apache-2.0
"""Trains DQN with the RMSProp of its paper, and with three versions found in ports.

    python examples/train_dqn.py
    python examples/train_dqn.py --environment Asterix-MinAtar --output runs/asterix
    python examples/train_dqn.py --seeds 5 --epochs 40 --output runs/longer
    python examples/train_dqn.py --resume --epochs 20

The paper divides by the root of a variance plus an epsilon of 0.01, and sums the loss
over the batch. Three versions keep these numbers, and each changes one thing: the mean
square in place of the variance (optax.rmsprop); epsilon outside of the root (PyTorch);
the mean of the loss over the batch. A seed gives all versions the same weights, games
and random numbers.

The games are MinAtar's, in gymnax: pip install -e ".[rl]". An epoch is 5,000 frames and
1,250 updates. The output folder receives a checkpoint per epoch, train_dqn.png with the
returns and the share of weights ruled by epsilon, and train_dqn.json. A killed run
continues with --resume, and ends with the same numbers.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import optax
from common import command_line, deep_q, results, resumable
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import optax_rms

missing: str | None = None
try:
    import gymnax
except ModuleNotFoundError as error:
    gymnax: Any = None
    missing = error.name

GAMES = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")


# The colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLORS = {
    "recipes.dqn": "#0072B2",
    "not centered": "#009E73",
    "epsilon outside": "#D55E00",
    "mean loss": "#CC79A7",
}


def rules(learning_rate: float) -> list[deep_q.Rule]:
    """In the order of `COLORS`."""
    recipe = optax_rms.recipes.dqn(learning_rate)
    not_centered = optax.rmsprop(learning_rate, decay=0.95, eps=0.01)
    outside = optax_rms.dialects.torch.rmsprop(
        learning_rate, alpha=0.95, eps=0.01, centered=True
    )
    return [
        deep_q.Rule(recipe, 1, eps=0.01, eps_in_sqrt=True),
        deep_q.Rule(not_centered, 1, eps=0.01, eps_in_sqrt=True),
        deep_q.Rule(outside, 1, eps=0.01, eps_in_sqrt=False),
        deep_q.Rule(recipe, 1 / deep_q.BATCH_SIZE, eps=0.01, eps_in_sqrt=True),
    ]


def main(argv: list[str] | None = None) -> None:
    make_parser().run(train, argv, advice="; --resume continues this run")


def train(args: argparse.Namespace) -> None:
    if gymnax is None:
        sys.exit(
            f'train_dqn.py needs {missing}: pip install -e ".[rl]" installs gymnax, '
            "and six, which gymnax imports without installing it"
        )
    environment, parameters = gymnax.make(args.environment)
    trainer = deep_q.Trainer(
        environment, parameters, rules(args.learning_rate), args.seeds
    )
    stem = args.output / "train_dqn"
    if not args.resume:
        stem.with_suffix(".json").unlink(missing_ok=True)
    names = ("environment", "learning_rate", "seeds")
    settings = {name: getattr(args, name) for name in names}
    _, history = resumable.train(
        trainer.epoch,
        trainer.start(),
        args.epochs,
        args.output,
        settings,
        resume=args.resume,
        summary=lambda metrics: dict(
            zip(COLORS, np.mean(metrics["return"], axis=1), strict=True)
        ),
    )
    measured = settings | {
        "gymnax": version("gymnax"),
        "frames": [deep_q.EPOCH_FRAMES * (i + 1) for i in range(len(history))],
        # For each name, a list of epochs with a list of seeds.
        "runs": {
            name: {key: [epoch[key][i] for epoch in history] for key in history[0]}
            for i, name in enumerate(COLORS)
        },
    }
    draw(measured, stem.with_suffix(".png"))
    results.save(stem.with_suffix(".json"), args.command, measured)
    print_table(measured)
    print(f"{stem.name}.png, {stem.name}.json and checkpoints are in {args.output}")


def last_fifth(values: list[list[float]]) -> np.ndarray:
    """The mean over the last fifth of the epochs, for each seed."""
    return np.mean(values[-max(1, len(values) // 5) :], axis=0)


def draw(measured: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    returns, shares = figure.subplots(1, 2)
    frames = measured["frames"]
    for name, run in measured["runs"].items():
        for axes, key in ((returns, "return"), (shares, "ruled_by_eps")):
            values = np.array(run[key])
            low, mean, high = (
                values.min(axis=1),
                values.mean(axis=1),
                values.max(axis=1),
            )
            axes.fill_between(
                frames, low, high, color=COLORS[name], alpha=0.2, linewidth=0
            )
            axes.plot(frames, mean, color=COLORS[name], linewidth=2, label=name)
    returns.set_title(f"{measured['environment']}: return of an episode", loc="left")
    shares.set_title("Weights ruled by epsilon", loc="left")
    shares.set(ylim=(-0.05, 1.05))
    shares.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for axes in (returns, shares):
        axes.set(xlabel=f"frames; mean and range of {measured['seeds']} seeds")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
    returns.legend()
    figure.savefig(file, dpi=150)


def print_table(measured: dict[str, Any]) -> None:
    print("last fifth       return (range of the seeds)  ruled by epsilon")
    for name, run in measured["runs"].items():
        found = last_fifth(run["return"])
        share = last_fifth(run["ruled_by_eps"]).mean()
        seeds = f"({found.min():.2f} to {found.max():.2f})"
        print(f"{name:15}  {found.mean():6.2f} {seeds:>20}  {share:16.0%}")


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, output="runs/dqn")
    add = parser.add_argument
    add(
        "--environment",
        choices=[f"{game}-MinAtar" for game in GAMES],
        default="Breakout-MinAtar",
        help="the game",
    )
    add("--epochs", type=command_line.count(), default=10, help="of 5,000 frames each")
    add(
        "--seeds",
        type=command_line.number(int, 1, 100, "a whole number from 1 to 100"),
        default=3,
        help="number of agents for each optimizer",
    )
    add(
        "--learning-rate",
        type=command_line.positive,
        default=2.5e-4,
        help="of all optimizers",
    )
    add("--resume", action="store_true", help="continue the run in the output folder")
    return parser


if __name__ == "__main__":
    main()
