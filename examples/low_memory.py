# SPDX-License-Identifier: Apache-2.0
"""Trains a transformer with 4 bytes per weight, beside float32 with 8 and 12.

    python examples/low_memory.py
    python examples/low_memory.py --steps 2000 --seed 1 --output runs/longer

Weights and optimizer state outlive a step, and their bytes are counted. With bfloat16
weights, a residual of one byte and a mean square of one byte, RMSProp needs 4. Plain
bfloat16 weights and mean squares take 4 bytes as well and learn worse, for lack of the
residual and of stochastic rounding. All runs start from the same weights, rounded where
they are bfloat16, and see the same batches of the text behind Python's `help()`.

The output folder receives low_memory.png, the losses and the memory in one picture, and
low_memory.json.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from common import characters, command_line, results
from matplotlib.figure import Figure
from tqdm import tqdm

import optax_rms

EVALUATIONS = 20


class Recipe(NamedTuple):
    """The dtype of the weights, and the optimizer."""

    name: str
    weights: Any
    optimizer: optax.GradientTransformation
    color: str


def recipes(steps: int) -> list[Recipe]:
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, max(1, steps // 10), steps)
    rmsprop = partial(optax_rms.rmsprop, rate, decay=0.99, bias_correction=True)
    four_bytes = optax_rms.split_master_weights(
        optax_rms.compress_state(rmsprop(), nu=optax_rms.UE6M2), residual_bits=8
    )
    plain = rmsprop(accumulator_dtype=jnp.bfloat16)
    return [
        Recipe("float32 Adam", jnp.float32, optax.adam(rate), "tab:gray"),
        Recipe("float32 RMSProp", jnp.float32, rmsprop(), "tab:blue"),
        Recipe("4-byte RMSProp", jnp.bfloat16, four_bytes, "tab:orange"),
        Recipe("plain bfloat16", jnp.bfloat16, plain, "tab:red"),
    ]


class Run(NamedTuple):
    """The measurements of a run.

    Attributes:
      losses: of validation, in nats per character, at equal distances from the first
        step to the last.
      num_bytes: of the weights and of each part of the optimizer's state.
    """

    losses: list[float]
    num_bytes: dict[str, int]


def main(argv: list[str] | None = None) -> None:
    make_parser().run(compare, argv)


def compare(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    text = characters.load()
    width, depth = (16, 1) if args.quick else (64, 2)
    network = characters.Transformer(text.vocabulary, width, depth)
    init_key, batch_key = jax.random.split(jax.random.key(args.seed))
    params = jax.jit(network.init)(init_key, text.validation[:1, :-1])
    num_weights = sum(p.size for p in jax.tree.leaves(params))

    chosen = recipes(args.steps)
    with tqdm(total=len(chosen) * EVALUATIONS, unit="evaluation") as progress:
        runs = {
            recipe.name: train(
                recipe, network, params, text, batch_key, args.steps, progress
            )
            for recipe in chosen
        }
    stem = args.output / "low_memory"
    colors = {recipe.name: recipe.color for recipe in chosen}
    draw(runs, colors, num_weights, args.steps, stem.with_suffix(".png"))
    measured = {
        "steps": args.steps,
        "seed": args.seed,
        "num_weights": num_weights,
        "vocabulary": text.vocabulary,
        "runs": {
            name: {"val_loss": run.losses, "bytes": run.num_bytes}
            for name, run in runs.items()
        },
    }
    results.save(stem.with_suffix(".json"), args.command, measured)
    print_table(runs, num_weights)
    print(f"{stem.name}.png and .json are in {args.output}")


def train(
    recipe: Recipe,
    network: characters.Transformer,
    params: Any,
    text: characters.Text,
    batch_key: jax.Array,
    steps: int,
    progress: tqdm,
) -> Run:
    @partial(jax.jit, donate_argnums=(0, 1))
    def advance(weights: Any, state: Any, step: int, training: jax.Array) -> Any:
        windows = characters.batch(jax.random.fold_in(batch_key, step), training)
        gradients = jax.grad(characters.loss)(weights, network, windows)
        updates, state = recipe.optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    evaluate = jax.jit(characters.loss, static_argnums=1)
    # A copy, since every step donates the memory of its arguments.
    weights = jax.tree.map(lambda p: jnp.array(p, recipe.weights), params)
    state = recipe.optimizer.init(weights)
    losses = [float(evaluate(weights, network, text.validation))]
    for step in range(steps):
        weights, state = advance(weights, state, step, text.training)
        if step + 1 in evaluation_steps(steps):
            losses.append(float(evaluate(weights, network, text.validation)))
            progress.set_postfix_str(f"{recipe.name}: {losses[-1]:.3f}", refresh=False)
            progress.update()
    return Run(losses, count_bytes(weights, state))


def evaluation_steps(steps: int) -> list[int]:
    return [steps * i // EVALUATIONS for i in range(EVALUATIONS + 1)]


def count_bytes(weights: Any, state: Any) -> dict[str, int]:
    """Bytes of the weights, of each field with an element per weight, and the rest."""
    fields = {"residual": "residual", "mean square": "nu", "mean": "mu"}
    parts = {"weights": weights} | {
        part: optax.tree.get(state, field) for part, field in fields.items()
    }
    found = {part: nbytes(tree) for part, tree in parts.items() if tree is not None}
    return found | {"counters": nbytes((weights, state)) - sum(found.values())}


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def draw(
    runs: dict[str, Run],
    colors: dict[str, str],
    num_weights: int,
    steps: int,
    file: Path,
) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for row, (name, run) in enumerate(runs.items()):
        curves.plot(
            evaluation_steps(steps),
            run.losses,
            # Where two curves coincide, both can be seen.
            linestyle="--" if row == 2 else "-",
            linewidth=2,
            color=colors[name],
            label=f"{run.losses[-1]:.3f}  {name}",
        )
        parts = {part: n / num_weights for part, n in run.num_bytes.items()}
        left = 0.0
        for i, width in enumerate(parts.values()):
            shade = {"color": colors[name], "alpha": 1 - 0.25 * i, "edgecolor": "white"}
            bars.barh(row, width, 0.5, left, **shade)
            left += width
        bars.text(left + 0.15, row, f"{left:.2f}", va="center", fontweight="bold")
        whole = [f"{part} {n:.0f}" for part, n in parts.items() if n > 0.5]
        bars.text(0, row + 0.28, " + ".join(whole), va="top", fontsize="small")
    # The steep beginning would leave no room to tell the ends apart.
    shown = EVALUATIONS // 4
    curves.set_xlim(evaluation_steps(steps)[shown], steps)
    highest = max(run.losses[shown] for run in runs.values())
    lowest = min(run.losses[-1] for run in runs.values())
    curves.set_ylim(lowest - 0.05 * (highest - lowest), highest)
    curves.set(xlabel="step")
    curves.set_title("Validation loss, nats per character", loc="left")
    curves.grid(alpha=0.3)
    curves.legend()
    bars.set_yticks(range(len(runs)), list(runs))
    bars.set(xticks=[], xlim=(0, 13.5), ylim=(len(runs) - 0.4, -0.4))
    bars.set_title("Bytes per weight that outlive a step", loc="left")
    bars.spines[:].set_visible(False)
    bars.tick_params(left=False)
    figure.savefig(file, dpi=150)


def print_table(runs: dict[str, Run], num_weights: int) -> None:
    print(f"{num_weights} weights     bytes per weight  validation loss")
    for name, run in runs.items():
        per_weight = sum(run.num_bytes.values()) / num_weights
        print(f"{name:15}  {per_weight:16.3f}  {run.losses[-1]:15.4f}")


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__file__, __doc__, output="runs/memory")
    add = parser.add_argument
    add("--steps", type=command_line.count(EVALUATIONS), default=500, help="per run")
    add("--seed", type=command_line.seed, default=0, help="of weights and batches")
    add("--quick", action="store_true", help="train a far smaller network")
    return parser


if __name__ == "__main__":
    main()
