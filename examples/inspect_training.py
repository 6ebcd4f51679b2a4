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
NETWORK: Any = digits.Network()


class Variant(NamedTuple):
    """One way to train.

    Attributes:
      loss_scale: 1 for a mean over the batch, its size for a sum.
      dtype: of the weights of the first layer.
      tx: the optimizer, inside of `optax_rms.monitor`.
    """

    loss_scale: int
    dtype: Any
    tx: optax.GradientTransformation


class Case(NamedTuple):
    """A fault and its remedy.

    Attributes:
      title: of the pictures.
      figure: the figure of the report that shows the fault.
      share: what that figure is a share of.
      remark: what to see in the pictures.
      before: the variant with the fault, and its name.
      after: the variant without it, and its name.
    """

    title: str
    figure: str
    share: str
    remark: str
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


def cases(steps: int) -> list[Case]:
    def monitored(tx: optax.GradientTransformation, eps: float, decay: float) -> Any:
        return optax_rms.monitor(tx, interval(steps), eps=eps, decay=decay)

    impala = monitored(optax_rms.recipes.impala(steps), 0.1, 0.99)
    plain = optax_rms.rmsprop(1e-4, 0.9, 1e-8)
    split = optax_rms.split_master_weights(plain)
    float32, bfloat16 = jnp.float32, jnp.bfloat16
    return [
        Case(
            "IMPALA's epsilon of 0.1",
            "ruled_by_eps",
            "Weights of the first layer ruled by epsilon",
            "Mean squares start from 1 and need 230 steps to fall below epsilon.\n"
            "With the sum they do so only after the loss has fallen.",
            ("mean over the batch", Variant(1, float32, impala)),
            ("sum over the batch", Variant(BATCH_SIZE, float32, impala)),
        ),
        Case(
            "A first layer in bfloat16",
            "lost_to_rounding",
            "Updates of the first layer lost to rounding",
            "Near 0.1, bfloat16 numbers are 2^-11 apart, and a step of 1e-4\n"
            "rounds to none. The remedy adds steps up until a weight moves.",
            ("bfloat16", Variant(1, bfloat16, monitored(plain, 1e-8, 0.9))),
            ("split_master_weights", Variant(1, bfloat16, monitored(split, 1e-8, 0.9))),
        ),
    ]


def interval(steps: int) -> int:
    """Steps from one report to the next, so that there are at most `REPORTS`."""
    return -(-steps // REPORTS)


def main(argv: list[str] | None = None) -> None:
    make_parser().run(inspect, argv)


def inspect(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    training, validation = digits.prepare(*digits.load(), seed=args.seed)
    init_key, batch_key = jax.random.split(jax.random.key(args.seed))
    initial = jax.jit(NETWORK.init)(init_key, training.images[:1])
    chosen = cases(args.steps)
    runs: dict[str, Run] = {}
    reports = len(range(0, args.steps, interval(args.steps)))
    with tqdm(total=2 * len(chosen) * reports, unit="report") as progress:
        for case in chosen:
            for name, variant in (case.before, case.after):
                runs[name] = train(
                    *(variant, initial, training, validation),
                    *(args.steps, batch_key, progress),
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
    initial: Any,
    training: digits.Examples,
    validation: digits.Examples,
    steps: int,
    batch_key: jax.Array,
    progress: tqdm,
) -> Run:
    # A copy, since every step donates the memory of the parameters and the state.
    params = jax.tree.map(jnp.copy, initial)
    first = params["params"]["Dense_0"]
    first["kernel"] = first["kernel"].astype(variant.dtype)
    state = variant.tx.init(params)
    run = Run([], [], [])
    for step in range(steps):
        key = jax.random.fold_in(batch_key, step)
        params, state = advance(
            variant.tx, params, state, training, key, variant.loss_scale
        )
        # The steps that `monitor` reports on.
        if step % interval(steps) == 0:
            run.steps.append(step + 1)
            run.losses.append(float(mean_loss(params, validation)))
            report = optax_rms.read_report(state)
            run.reports.append(jax.tree.map(jnp.copy, report))
            progress.update()
    return run


# Two runs with the same optimizer share one compiled program.
@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def advance(
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    training: digits.Examples,
    key: jax.Array,
    loss_scale: int,
) -> Any:
    chosen = jax.random.choice(key, len(training.labels), (BATCH_SIZE,))
    batch = digits.Examples(training.images[chosen], training.labels[chosen])
    gradients = jax.grad(lambda p: loss_scale * mean_loss(p, batch))(params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


@jax.jit
def mean_loss(params: Any, batch: digits.Examples) -> jax.Array:
    return digits.loss_and_accuracy(params, NETWORK.apply, batch)[0]


def draw(chosen: list[Case], runs: dict[str, Run], file: Path) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
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
        shares.text(0, -0.22, case.remark, va="top", transform=shares.transAxes)
        shares.set(ylim=(-0.05, 1.05))
        shares.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        losses.set_title("\nValidation loss", loc="left")
        losses.set(yscale="log")
        for axes in (shares, losses):
            axes.set(xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend(title="last value")
    figure.savefig(file, dpi=150)


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, "runs/inspect")
    add = parser.add_argument
    add("--steps", type=command_line.count(REPORTS), default=1000, help="of each run")
    add("--seed", type=command_line.seed, default=0, help="of weights and batches")
    return parser


if __name__ == "__main__":
    main()
