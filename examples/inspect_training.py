# SPDX-License-Identifier: Apache-2.0
"""Finds out why a network does not train, with reports on its steps, and mends it.

    python examples/inspect_training.py
    python examples/inspect_training.py --steps 2000 --seed 1 --output runs/longer

Two runs go wrong without an error. Each is trained as it is, the report names the
cause, and the run is repeated with the cause removed.

IMPALA's settings have an epsilon of 0.1, for a loss that is a sum over the batch. Here
the loss is a mean, whose gradients are as many times smaller as the batch is large, and
epsilon rules every weight: RMSProp is then gradient descent with a tiny learning rate.
A sum in place of the mean is the remedy.

The first layer of the second network has bfloat16 weights. Near 0.1 these are 2^-11
apart, and a step of 1e-4 rounds to no step. `optax_rms.split_master_weights` keeps what
rounding takes.

The network reads scikit-learn's digits. The output folder receives the shares that the
reports found and the losses, before and after, as inspect_training.png and .json.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from common import command_line, digits, results
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tqdm import tqdm

import optax_rms

BATCH_SIZE = 256
REPORTS = 25
FIRST_LAYER = "params.Dense_0.kernel"


class Variant(NamedTuple):
    """One way to train.

    Attributes:
      loss_scale: 1 for a mean over the batch, its size for a sum.
      dtype: of the weights of the first layer.
      optimizer: from the number of steps.
      options: of `optax_rms.monitor`, which tell it about the optimizer.
    """

    loss_scale: int
    dtype: Any
    optimizer: Callable[[int], optax.GradientTransformation]
    options: dict[str, Any]


class Case(NamedTuple):
    """A fault and its remedy.

    Attributes:
      title: of the pictures.
      figure: the figure of the report that shows the fault.
      share: what that figure is a share of.
      before: the variant with the fault, and its name.
      after: the variant without it, and its name.
    """

    title: str
    figure: str
    share: str
    before: tuple[str, Variant]
    after: tuple[str, Variant]


class Run(NamedTuple):
    """The measurements of a run.

    Attributes:
      steps: the steps with a report, counted from 1.
      losses: mean cross-entropy of the validation digits after these steps.
      reports: the reports.
    """

    steps: list[int]
    losses: list[float]
    reports: list[optax_rms.StepReport]

    def shares(self, figure: str) -> list[float]:
        """A figure of the first layer, report by report."""
        values = (getattr(r.leaves[FIRST_LAYER], figure) for r in self.reports)
        # A split weight that does not move has no update that could be lost.
        return [value or 0.0 for value in values]


def cases() -> list[Case]:
    impala = {"eps": 0.1, "decay": 0.99}
    slow = {"eps": 1e-8, "decay": 0.9}

    def plain(steps: int) -> optax.GradientTransformation:
        return optax_rms.rmsprop(1e-4)

    def split(steps: int) -> optax.GradientTransformation:
        return optax_rms.split_master_weights(plain(steps))

    float32, bfloat16 = jnp.float32, jnp.bfloat16
    recipe = optax_rms.recipes.impala
    return [
        Case(
            "IMPALA's epsilon of 0.1",
            "ruled_by_eps",
            "Weights of the first layer ruled by epsilon",
            ("mean over the batch", Variant(1, float32, recipe, impala)),
            ("sum over the batch", Variant(BATCH_SIZE, float32, recipe, impala)),
        ),
        Case(
            "A first layer in bfloat16",
            "lost_to_rounding",
            "Updates of the first layer lost to rounding",
            ("bfloat16", Variant(1, bfloat16, plain, slow)),
            ("split_master_weights", Variant(1, bfloat16, split, slow)),
        ),
    ]


def main(argv: list[str] | None = None) -> None:
    make_parser().run(inspect, argv)


def inspect(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    training, validation = digits.prepare(*digits.load(), seed=args.seed)
    chosen = cases()
    runs: dict[str, Run] = {}
    with tqdm(total=2 * len(chosen) * REPORTS, unit="report") as progress:
        for case in chosen:
            for name, variant in (case.before, case.after):
                runs[name] = train(
                    variant, training, validation, args.steps, args.seed, progress
                )
                progress.set_postfix_str(f"{name}: {runs[name].losses[-1]:.3f}")
    stem = args.output / "inspect_training"
    draw(chosen, runs, stem.with_suffix(".png"))
    measured = {
        "steps": args.steps,
        "seed": args.seed,
        "runs": {
            name: {
                "steps": run.steps,
                "val_loss": run.losses,
                case.figure: run.shares(case.figure),
            }
            for case in chosen
            for name, run in ((n, runs[n]) for n, _ in (case.before, case.after))
        },
    }
    results.save(stem.with_suffix(".json"), args.command, measured)
    for case in chosen:
        for when, (name, _) in (("before", case.before), ("after", case.after)):
            run = runs[name]
            print(f"{case.title}, {when}: {name}, step {run.steps[-1]}")
            print(f"{run.reports[-1].table()}\n")
    print(f"{stem.name}.png and .json are in {args.output}")


def train(
    variant: Variant,
    training: digits.Examples,
    validation: digits.Examples,
    steps: int,
    seed: int,
    progress: tqdm,
) -> Run:
    every = steps // REPORTS
    tx = optax_rms.monitor(variant.optimizer(steps), every, **variant.options)
    network: Any = digits.Network()
    init_key, batch_key = jax.random.split(jax.random.key(seed))

    @partial(jax.jit, donate_argnums=(0, 1))
    def advance(params: Any, state: Any, step: int) -> Any:
        chosen = jax.random.choice(
            jax.random.fold_in(batch_key, step), len(training.labels), (BATCH_SIZE,)
        )
        batch = digits.Examples(training.images[chosen], training.labels[chosen])

        def loss(params: Any) -> jax.Array:
            mean, _ = digits.loss_and_accuracy(params, network.apply, batch)
            return variant.loss_scale * mean

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def evaluate(params: Any) -> jax.Array:
        return digits.loss_and_accuracy(params, network.apply, validation)[0]

    params = jax.jit(network.init)(init_key, training.images[:1])
    kernel = params["params"]["Dense_0"]["kernel"]
    params["params"]["Dense_0"]["kernel"] = kernel.astype(variant.dtype)
    state = tx.init(params)
    run = Run([], [], [])
    for step in range(steps):
        params, state = advance(params, state, step)
        # The steps that `monitor` reports on.
        if step % every == 0:
            run.steps.append(step + 1)
            run.losses.append(float(evaluate(params)))
            # A copy, since the next step donates the memory of the state.
            run.reports.append(jax.tree.map(jnp.copy, optax_rms.read_report(state)))
            progress.update()
    return run


def draw(chosen: list[Case], runs: dict[str, Run], file: Path) -> None:
    figure = Figure(figsize=(11, 7), layout="constrained")
    rows = figure.subplots(len(chosen), 2)
    for case, (shares, losses) in zip(chosen, rows, strict=True):
        for (name, _), color in ((case.before, "tab:red"), (case.after, "tab:blue")):
            run = runs[name]
            values = run.shares(case.figure)
            label = f"{values[-1]:.0%}  {name}"
            shares.plot(run.steps, values, color=color, linewidth=2, label=label)
            label = f"{run.losses[-1]:.3f}  {name}"
            losses.plot(run.steps, run.losses, color=color, linewidth=2, label=label)
        shares.set_title(f"{case.title}\n{case.share}", loc="left")
        shares.set(ylim=(-0.05, 1.05))
        shares.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        losses.set_title("\nValidation loss", loc="left")
        losses.set(yscale="log")
        for axes in (shares, losses):
            axes.set(xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend()
    figure.savefig(file, dpi=150)


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, "runs/inspect")
    add = parser.add_argument
    add("--steps", type=command_line.count(REPORTS), default=1000, help="of each run")
    add("--seed", type=command_line.seed, default=0, help="of weights and batches")
    return parser


if __name__ == "__main__":
    main()
