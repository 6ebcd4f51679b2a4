# SPDX-License-Identifier: Apache-2.0
"""Training with moments in one or two bytes, compared with training in float32.

    python -m benchmarks.quality
    python -m benchmarks.quality --quick
    python -m benchmarks.quality --repeat   # with 20 other seeds

Three tasks, three optimizers, three decays, five seeds. For each format the runs start
from the same weights and see the same batches as the float32 runs, at the same learning
rate. Beside each run a float32 optimizer gets the same gradients, without an effect on
the weights, as the reference for the length of the steps and for the stored root.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

import optax_rms
from benchmarks import record, report
from benchmarks.tasks import TASKS, Examples, Task

SEEDS = 5
NEW_SEEDS = range(SEEDS, SEEDS + 20)
STEPS = 1500
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Nearest(optax_rms.Minifloat):
    """A format without stochastic rounding, to show the effect of such rounding."""

    def encode(self, x, bits, step=0):
        return super().encode(x, 2**31, step)


def nearest(format: optax_rms.Minifloat) -> Nearest:
    return Nearest(**dataclasses.asdict(format))


class Optimizer(NamedTuple):
    """An optimizer to compress.

    Attributes:
      make: from learning rate and decay.
      field: name of the squares in the state, for example ``"nu"``.
      eps: added to the squares or, if not ``eps_in_sqrt``, to their root.
      decays: to train with; Adagrad has 1.
      learning_rate: the best of 1 and 3 times the powers of ten, on each of the tasks,
        by the validation loss of float32 at decay 0.99.
    """

    make: Callable[[Any, Any], optax.GradientTransformation]
    field: str
    eps: float
    eps_in_sqrt: bool
    decays: tuple[float, ...]
    learning_rate: float

    def denominator(self, squares: jax.Array) -> jax.Array:
        if self.eps_in_sqrt:
            return jnp.sqrt(squares + self.eps)
        return jnp.sqrt(squares) + self.eps


OPTIMIZERS = {
    "RMSProp": Optimizer(
        optax_rms.rmsprop,
        "nu",
        1e-8,
        True,
        (0.9, 0.99, 0.999),
        3e-3,
    ),
    "Adam": Optimizer(
        lambda learning_rate, b2: optax.adam(learning_rate, b2=b2),
        "nu",
        1e-8,
        False,
        (0.9, 0.99, 0.999),
        3e-3,
    ),
    "Adagrad": Optimizer(
        lambda learning_rate, _: optax.adagrad(learning_rate),
        "sum_of_squares",
        1e-7,
        True,
        (1.0,),
        0.3,
    ),
}


def fitted(optimizer: Optimizer, decay: float) -> optax_rms.Minifloat:
    """One byte, fitted to the eps and the decay of the optimizer."""
    window = optax_rms.UE6M2.for_eps(optimizer.eps, optimizer.eps_in_sqrt)
    return dataclasses.replace(window, decay=decay)


FORMATS = {
    "float32": None,
    "UE8M8": optax_rms.UE8M8,
    "UE6M2": optax_rms.UE6M2,
    "UE6M2, fitted": fitted,
    "bfloat16, nearest": nearest(optax_rms.SE8M7),
    "UE6M2, nearest": nearest(optax_rms.UE6M2),
}
UNBIASED = ("UE8M8", "UE6M2", "UE6M2, fitted")


class Outcome(NamedTuple):
    """Results of one run; the last two are averages over the last tenth of the run.

    Attributes:
      root_bias: mean, over weights, of the logarithm of the stored denominator relative
        to float32.
      root_noise: standard deviation of that logarithm.
      validation_loss: at the end.
      validation_accuracy: at the end.
      train_loss: of the batches.
      step_length: norm of the update relative to float32.
    """

    root_bias: Any
    root_noise: Any
    validation_loss: Any
    validation_accuracy: Any
    train_loss: Any
    step_length: Any


class Start(NamedTuple):
    """The start of all runs of one seed, the same for each format.

    Attributes:
      seed: uint32.
      params: the first weights.
      batches: the numbers of the training examples, `[steps, BATCH_SIZE]`.
    """

    seed: Any
    params: Any
    batches: Any


def start(task: Task, steps: int, seed: Any) -> Start:
    init_key, batch_key = jax.random.split(jax.random.key(seed))

    def draw(key):
        return jax.random.randint(key, (BATCH_SIZE,), 0, len(task.training.labels))

    batches = jax.vmap(draw)(jax.random.split(batch_key, steps))
    return Start(seed, task.init(init_key), batches)


def train(
    task: Task,
    optimizer: Optimizer,
    format: optax_rms.Minifloat | None,
    decay: Any,
    start: Start,
) -> Outcome:
    reference = optimizer.make(optimizer.learning_rate, decay)
    shadow = reference.init(start.params)
    if format is None:
        tx, state = reference, shadow
    else:
        tx = optax_rms.compress_state(reference, **{optimizer.field: format})
        # Without this, the members of a vmap would be rounded by the same bits.
        rounding_step = start.seed * np.uint32(2**20)
        state = tx.init(start.params)._replace(rounding_step=rounding_step)

    def step(carry, batch):
        params, state, shadow = carry
        examples = Examples(*(x[batch] for x in task.training))
        (loss, _), gradients = jax.value_and_grad(task.loss_and_accuracy, has_aux=True)(
            params, examples
        )
        updates, state = tx.update(gradients, state, params)
        expected, shadow = reference.update(gradients, shadow, params)
        length = jnp.linalg.norm(flat(updates)) / jnp.linalg.norm(flat(expected))
        return (optax.apply_updates(params, updates), state, shadow), (loss, length)

    carry, histories = jax.lax.scan(step, (start.params, state, shadow), start.batches)
    params, state, shadow = carry
    if format is not None:
        state = optax_rms.decompress_state(state)
    last = len(start.batches) // 10
    return Outcome(
        *root_error(optimizer, state, shadow),
        *task.loss_and_accuracy(params, task.validation),
        *(jnp.mean(history[-last:]) for history in histories),
    )


def root_error(optimizer: Optimizer, state: Any, shadow: Any) -> tuple[Any, Any]:
    """Bias and noise of the stored denominator, where there ever was a gradient."""
    stored, expected = (
        flat(optax.tree.get(s, optimizer.field)) for s in (state, shadow)
    )
    error = jnp.log(optimizer.denominator(stored) / optimizer.denominator(expected))
    seen = expected > 0
    return jnp.mean(error, where=seen), jnp.std(error, where=seen)


def flat(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


def train_all(task: Task, optimizer: Optimizer, format: Any, starts: Start) -> Outcome:
    """The outcomes for all decays and seeds, as arrays `[decays, seeds]`."""

    def train_with(format, decays):
        of_seeds = jax.vmap(partial(train, task, optimizer, format), in_axes=(None, 0))
        of_decays = jax.jit(jax.vmap(of_seeds, in_axes=(0, None)))
        outcome = of_decays(np.array(decays, np.float32), starts)
        return jax.tree.map(np.asarray, outcome)

    if format is not fitted:
        return train_with(format, optimizer.decays)
    outcomes = [train_with(fitted(optimizer, d), [d]) for d in optimizer.decays]
    return jax.tree.map(lambda *x: np.concatenate(x), *outcomes)


def measure(quick: bool, progress: Any = tqdm) -> dict[str, Any]:
    """Trains all networks; ``quick`` trains one, with RMSProp, for a short while."""
    tasks, optimizers = (["digits"], ["RMSProp"]) if quick else (TASKS, OPTIMIZERS)
    cells = [
        (task, name, OPTIMIZERS[name].decays, format)
        for task, name, format in itertools.product(tasks, optimizers, FORMATS)
    ]
    return measure_cells(cells, STEPS // 10 if quick else STEPS, range(SEEDS), progress)


def repeat(first: dict[str, Any], progress: Any = tqdm) -> dict[str, Any]:
    """Trains with new seeds where a format of `UNBIASED` was apart from float32.

    Among many cells some are apart by chance, and not again with other seeds.
    """
    apart = report.apart(first["rows"], UNBIASED)
    cells = [
        (task, name, (decay,), format)
        for task, name, decay in apart
        for format in ("float32", *UNBIASED)
    ]
    return measure_cells(cells, first["steps"], NEW_SEEDS, progress)


def measure_cells(
    cells: list[tuple[str, str, tuple[float, ...], str]],
    steps: int,
    seeds: Sequence[int],
    progress: Any,
) -> dict[str, Any]:
    """Trains a task by an optimizer with some decays in a format, for each cell."""
    tasks = {name: TASKS[name]() for name in dict.fromkeys(cell[0] for cell in cells)}
    starts = {
        name: jax.jit(jax.vmap(partial(start, task, steps)))(np.array(seeds, np.uint32))
        for name, task in tasks.items()
    }
    rows = []
    for task, name, decays, format in progress(cells, unit="program"):
        optimizer = OPTIMIZERS[name]._replace(decays=decays)
        outcome = train_all(tasks[task], optimizer, FORMATS[format], starts[task])
        for i, decay in enumerate(decays):
            values = {k: v[i].tolist() for k, v in outcome._asdict().items()}
            rows.append(
                {"task": task, "optimizer": name, "decay": decay, "format": format}
                | values
            )
    return {
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "seeds": len(seeds),
        "learning_rates": {k: o.learning_rate for k, o in OPTIMIZERS.items()},
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="save nothing")
    parser.add_argument("--repeat", action="store_true", help="what was apart")
    options = parser.parse_args(argv)
    if options.repeat:
        first = report.read(record.RESULTS, "quality")
        record.save("quality_repeated", repeat(first["measured"]))
        return
    measured = measure(options.quick)
    if not options.quick:
        record.save("quality", measured)


if __name__ == "__main__":
    main()
