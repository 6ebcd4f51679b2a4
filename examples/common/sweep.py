# SPDX-License-Identifier: Apache-2.0
"""Many training runs at once: one compiled program trains every one of them.

`jax.vmap` turns a program that trains one network into a program that trains a network
per learning rate, decay and seed. `optax.inject_hyperparams` makes this possible: the
hyperparameters become part of the optimizer's state, for example
`state.hyperparams["learning_rate"]`, and each run has a state of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from . import digits

BATCH_SIZE = 32
_NOTHING = optax.identity()


def load() -> list[digits.Examples]:
    """Training, validation and test examples of scikit-learn's digits, 64:16:20."""
    rest, test = (
        digits.Examples(*map(np.asarray, examples))
        for examples in digits.prepare(*digits.load(), seed=0)
    )
    return digits.prepare(rest, test, seed=0)


def start(
    make_optimizer: Callable[..., optax.GradientTransformation],
    hyperparameters: dict[str, np.ndarray],
    seeds: np.ndarray,
    num_pixels: int,
) -> tuple[TrainState, jax.Array]:
    """Initial states and shuffle keys, both with a leading axis of runs.

    Args:
      make_optimizer: called with the hyperparameters by name.
      hyperparameters: one value per run, `[runs]`, for each name.
      seeds: integers `[runs]`. Runs of the same seed start from the same weights and
        see the same batches.
      num_pixels: of an image.
    """
    optimizer = optax.inject_hyperparams(make_optimizer)(
        **{name: values[0] for name, values in hyperparameters.items()}
    )

    def add_optimizer(state: TrainState, values: dict[str, jax.Array]) -> TrainState:
        opt_state = optax.tree.set(optimizer.init(state.params), **values)
        return state.replace(tx=optimizer, opt_state=opt_state)

    states, keys = _untrained(jnp.asarray(seeds), num_pixels)
    values = {
        name: jnp.asarray(values, jnp.float32)
        for name, values in hyperparameters.items()
    }
    return jax.vmap(add_optimizer)(states, values), keys


@partial(jax.jit, static_argnames="num_pixels")
def _untrained(seeds: jax.Array, num_pixels: int) -> Any:
    def one(seed: jax.Array) -> Any:
        init_key, shuffle_key = jax.random.split(jax.random.key(seed))
        return digits.create_state(_NOTHING, init_key, num_pixels), shuffle_key

    return jax.vmap(one)(seeds)


# The examples are the same for all runs, the state and the shuffle are their own.
train_epoch = jax.jit(
    jax.vmap(
        partial(digits.train_epoch, batch_size=BATCH_SIZE), in_axes=(0, 0, None, None)
    ),
    donate_argnums=0,
)


@jax.jit
def evaluate(params: Any, examples: digits.Examples) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy `[runs]` of each run's network."""
    apply: Any = digits.Network().apply
    return jax.vmap(lambda p: digits.loss_and_accuracy(p, apply, examples))(params)
