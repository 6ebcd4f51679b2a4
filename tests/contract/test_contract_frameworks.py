# SPDX-License-Identifier: Apache-2.0
"""The contract with Flax, Equinox, and what saves and restores a state."""

import pickle

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from flax.training.train_state import TrainState
from helpers.comparison import assert_same_bits
from helpers.contract_rows import every_row
from helpers.running import at, run, step
from helpers.training import GRADIENTS, PARAMS, assert_close, plain

STEPS = 3
INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)


def loss(outputs):
    return jnp.mean(jnp.sin(outputs))


def train(tx, params, gradient):
    """The plain loop, with gradients that follow the parameters."""
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(tx, params, state, gradient(params))
    return params, state


LINEN = nn.Dense(2)
LINEN_PARAMS = LINEN.init(jax.random.key(0), INPUTS)
linen_gradient = jax.jit(jax.grad(lambda params: loss(LINEN.apply(params, INPUTS))))


@every_row
def test_flax_train_state(row):
    state = TrainState.create(apply_fn=LINEN.apply, params=LINEN_PARAMS, tx=row())
    for _ in range(STEPS):
        state = state.apply_gradients(grads=linen_gradient(state.params))
    assert state.step == STEPS
    expected = train(row(), LINEN_PARAMS, linen_gradient)
    assert_same_bits((state.params, state.opt_state), expected)


nnx_gradient = nnx.jit(nnx.grad(lambda model: loss(model(INPUTS))))


@every_row
def test_flax_nnx_optimizer(row):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    expected, _ = train(row(), params, lambda p: nnx_gradient(nnx.merge(graph, p)))
    optimizer = nnx.Optimizer(model, row(), wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, gradient):
        optimizer.update(model, gradient)

    for _ in range(STEPS):
        update(model, optimizer, nnx_gradient(model))
    assert_close(nnx.state(model), expected)


EQUINOX = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
equinox_gradient = eqx.filter_jit(
    eqx.filter_grad(lambda model: loss(jax.vmap(model)(INPUTS)))
)


@every_row
def test_equinox(row):
    """A model has leaves that are functions; filtered, they are `None`."""
    model, tx = EQUINOX, row()
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(params)
    for _ in range(STEPS):
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(equinox_gradient(model), state, params)
        model = eqx.apply_updates(model, updates)
    expected = train(
        row(),
        eqx.filter(EQUINOX, eqx.is_inexact_array),
        lambda params: equinox_gradient(eqx.combine(params, rest)),
    )
    assert_same_bits((eqx.filter(model, eqx.is_inexact_array), state), expected)


def continues(row, save_and_restore):
    """A state restored halfway ends with the bits of the run that was not stopped."""
    tx = row()
    _, params, state = at(plain(row), 1)
    restored = save_and_restore(tx, state)
    assert_same_bits(restored, state)
    history = run(tx, at(GRADIENTS, slice(2, None)), params, restored)
    assert_same_bits(history, at(plain(row), slice(2, None)))


@every_row
def test_pickle(row):
    continues(row, lambda tx, state: pickle.loads(pickle.dumps(state)))


@every_row
def test_flax_serialization(row):
    def save_and_restore(tx, state):
        stored = flax.serialization.to_bytes(state)
        return flax.serialization.from_bytes(tx.init(PARAMS), stored)

    continues(row, save_and_restore)


@every_row
def test_orbax(row, tmp_path):
    def save_and_restore(tx, state):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            return checkpointer.restore(tmp_path / "state", tx.init(PARAMS))

    continues(row, save_and_restore)
