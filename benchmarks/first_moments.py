# SPDX-License-Identifier: Apache-2.0
"""Training with first moments in one or two bytes, compared with training in float32.

    python -m benchmarks.first_moments

Three tasks, three optimizers, five seeds, and for each optimizer and task the learning
rate that is best in float32. The runs of all formats start from the same weights and
see the same batches.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import optax_rms
from benchmarks import quality, record
from benchmarks.quality import BATCH_SIZE, STEPS, Start
from benchmarks.tasks import TASKS, Examples, Task

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# The learning rates are chosen with other seeds than the formats are compared with.
SEEDS_OF_RATES = range(5, 7)
SEEDS = range(7, 12)

Formats = Mapping[str, optax_rms.Minifloat]


class Optimizer(NamedTuple):
    """An optimizer with a first moment to store.

    Attributes:
      make: from the learning rate.
      field: name of the first moment in the state.
      decay: of the first moment.
      squares: the format that fits ``nu``, if the optimizer has it.
    """

    make: Callable[[Any], optax.GradientTransformation]
    field: str
    decay: float
    squares: optax_rms.Minifloat | None = None

    @property
    def formats(self) -> dict[str, Formats]:
        """What is stored in which format, for each run that is compared."""
        one, two = optax_rms.SE5M2, optax_rms.SE8M7
        fitted = dataclasses.replace(one, decay=self.decay)
        formats: dict[str, Formats] = {
            "float32": {},
            "SE8M7": {self.field: two},
            "SE5M2": {self.field: one},
            "SE5M2, fitted": {self.field: fitted},
        }
        if self.squares is not None:
            formats["SE8M7, and squares"] = {self.field: two, "nu": self.squares}
            formats["SE5M2, and squares"] = {self.field: one, "nu": self.squares}
        return formats


OPTIMIZERS = {
    "Adam": Optimizer(
        optax.adam, "mu", 0.9, quality.fitted(quality.OPTIMIZERS["Adam"], 0.999)
    ),
    "RMSProp, momentum": Optimizer(
        lambda rate: optax_rms.rmsprop(rate, decay=0.99, momentum=0.9),
        "trace",
        0.9,
        quality.fitted(quality.OPTIMIZERS["RMSProp"], 0.99),
    ),
    "Lion": Optimizer(optax.lion, "mu", 0.99),
}


class Losses(NamedTuple):
    """Of the batches, averaged over the last tenth of a run, and at its end."""

    train_loss: Any
    validation_loss: Any


def train(
    task: Task, optimizer: Optimizer, formats: Formats, rate: Any, start: Start
) -> Losses:
    tx = optimizer.make(rate)
    state = tx.init(start.params)
    if formats:
        tx = optax_rms.compress_state(tx, **formats)
        state = optax_rms.seed_rounding(tx.init(start.params), start.seed)

    def step(carry, batch):
        params, state = carry
        examples = Examples(*(x[batch] for x in task.training))
        (loss, _), gradients = jax.value_and_grad(task.loss_and_accuracy, has_aux=True)(
            params, examples
        )
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (start.params, state), start.batches)
    last = max(1, len(start.batches) // 10)
    validation_loss, _ = task.loss_and_accuracy(params, task.validation)
    return Losses(jnp.mean(losses[-last:]), validation_loss)


def train_all(
    task: Task, optimizer: Optimizer, formats: Formats, rates: Any, starts: Start
) -> Losses:
    """The losses for all learning rates and seeds, as arrays `[rates, seeds]`."""
    of_seeds = jax.vmap(partial(train, task, optimizer, formats), in_axes=(None, 0))
    of_rates = jax.jit(jax.vmap(of_seeds, in_axes=(0, None)))
    losses = of_rates(np.array(rates, np.float32), starts)
    return jax.tree.map(np.asarray, losses)


def measure(quick: bool, progress: Any = tqdm) -> dict[str, Any]:
    """Trains all networks; ``quick`` trains one for a short while."""
    tasks, steps = (["digits"], STEPS // 50) if quick else (list(TASKS), STEPS)
    cells = [(task, name) for task in tasks for name in OPTIMIZERS]
    rates, rows = [], []
    for task_name, name in progress(cells, unit="optimizer"):
        task, optimizer = TASKS[task_name](), OPTIMIZERS[name]
        cell = {"task": task_name, "optimizer": name}
        choice, compared = (
            jax.jit(jax.vmap(partial(quality.start, task, steps)))(
                np.array(seeds, np.uint32)
            )
            for seeds in (SEEDS_OF_RATES, SEEDS)
        )
        tried = train_all(task, optimizer, {}, RATES, choice).validation_loss
        rate = RATES[int(np.nanargmin(tried.mean(axis=1)))]
        rates.append(cell | {"rate": rate, "validation_loss": tried.tolist()})
        for column, formats in optimizer.formats.items():
            losses = train_all(task, optimizer, formats, [rate], compared)
            values = {k: v[0].tolist() for k, v in losses._asdict().items()}
            # The key that the table of `quality` has, where there are several decays.
            rows.append(cell | {"decay": 1, "format": column} | values)
    return {
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "seeds": len(SEEDS),
        "tried_rates": RATES,
        "rates": rates,
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="save nothing")
    options = parser.parse_args(argv)
    measured = measure(options.quick)
    if not options.quick:
        record.save("first_moments", measured)


if __name__ == "__main__":
    main()
