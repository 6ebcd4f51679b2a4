# SPDX-License-Identifier: Apache-2.0
"""Runs that start in `optax.rmsprop` and go on here, through files and wrappers.

That the trajectories agree is tested beside each function.
"""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers.reference import gradient_stream, relative_error
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


def run(tx, state, gradients):
    """The summed updates in float64, and the state that is left."""
    total, path = np.zeros(gradients.shape[1:]), []
    for g in gradients:
        update, state = tx.update(jnp.asarray(g), state)
        total = total + np.asarray(update, np.float64)
        path.append(total)
    return np.stack(path), state


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
        expected, _ = run(theirs, theirs.init(start), GRADIENTS)
        first, state = run(theirs, theirs.init(start), GRADIENTS[:4])
    restored = save_and_restore(state, ours.init(start), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    second, state = run(ours, restored, GRADIENTS[4:8])
    with jax.numpy_dtype_promotion("standard"):
        third, _ = run(theirs, state, GRADIENTS[8:])
    path = np.concatenate([first, first[-1] + second, first[-1] + second[-1] + third])
    assert relative_error(path, expected) < rounding_bound(np.float32, STEPS)
