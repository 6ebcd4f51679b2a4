# SPDX-License-Identifier: Apache-2.0
"""Runs that start in `optax.rmsprop` and go on here, through files and wrappers.

That the trajectories agree is tested beside each function.
"""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers.reference import gradient_stream, relative_error
from helpers.running import run
from helpers.trajectory import rounding_bound

import optax_rms

STEPS = 12
GRADIENTS = gradient_stream(STEPS)


def halving(count):
    return 0.1 * jnp.where(count < STEPS // 2, 1.0, 0.5)


OPTIONS = {
    "plain": {"learning_rate": 0.1},
    "momentum": {"learning_rate": 0.1, "momentum": 0.9},
    "schedule": {"learning_rate": halving, "momentum": 0.9, "nesterov": True},
    "bias_correction": {"learning_rate": 0.1, "bias_correction": True},
}
WRAPPERS = {
    "alone": lambda rmsprop, **options: rmsprop(**options),
    "inject_hyperparams": lambda rmsprop, **options: optax.inject_hyperparams(rmsprop)(
        **options
    ),
    "chain": lambda rmsprop, **options: optax.chain(
        optax.clip_by_global_norm(1e6), rmsprop(**options)
    ),
    "partition": lambda rmsprop, **options: optax.partition(
        {"all": rmsprop(**options)}, "all"
    ),
}


def through_orbax(state, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


def through_flax(state, like, folder):
    del folder
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


@pytest.mark.parametrize("save_and_restore", [through_orbax, through_flax])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_checkpoint_goes_over_and_back(options, wrap, save_and_restore, tmp_path):
    ours, theirs = wrap(optax_rms.rmsprop, **options), wrap(optax.rmsprop, **options)
    start = jnp.zeros(GRADIENTS.shape[1])
    # Optax's bias correction needs the standard promotion.
    with jax.numpy_dtype_promotion("standard"):
        expected = run(theirs, GRADIENTS)
        first = run(theirs, GRADIENTS[:4])
    state = first.last[1]
    restored = save_and_restore(state, ours.init(start), tmp_path)
    chex.assert_trees_all_equal(restored, state, strict=True)
    second = run(ours, GRADIENTS[4:8], state=restored)
    with jax.numpy_dtype_promotion("standard"):
        third = run(theirs, GRADIENTS[8:], state=second.last[1])
    updates = np.concatenate([first.updates, second.updates, third.updates])
    path = np.cumsum(updates, axis=0, dtype=np.float64)
    assert relative_error(path, expected.path) < rounding_bound(np.float32, STEPS)
