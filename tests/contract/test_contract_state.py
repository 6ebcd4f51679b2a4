# SPDX-License-Identifier: Apache-2.0
"""The contract with whoever makes a state: where it lies, and what it is made from."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.contract_rows import every_row
from helpers.running import at
from helpers.training import GRADIENTS, PARAMS
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@every_row
def test_jit_of_init_lies_where_the_parameters_lie(row):
    """A constant would be put on one device: of zeros, XLA sees no operand."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    specs = {"kernel": PartitionSpec("x", "y"), "bias": PartitionSpec(("x", "y"))}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(PARAMS, shardings)
    by_shape = {PARAMS[name].shape: shardings[name] for name in PARAMS}
    state = jax.jit(row().init)(params)
    chex.assert_trees_all_equal(state, row().init(PARAMS))
    placed = [x for x in jax.tree.leaves(state) if x.shape in by_shape]
    assert placed
    for x in placed:
        assert x.sharding.is_equivalent_to(by_shape[x.shape], x.ndim)


@every_row
def test_init_of_shapes_alone(row):
    abstract = jax.eval_shape(lambda: PARAMS)
    expected = row().init(PARAMS)
    for state in (row().init(abstract), jax.eval_shape(row().init, abstract)):
        chex.assert_trees_all_equal_structs(state, expected)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)


class Model(eqx.Module):
    """A layer that counts its calls."""

    kernel: jax.Array
    calls: jax.Array
    flag: bool


@every_row
@pytest.mark.parametrize("filtering", [eqx.is_array, eqx.is_inexact_array])
def test_integer_leaves_have_no_state(row, filtering):
    """The idiom of Equinox, whose `eqx.filter_grad` gives None for such a leaf."""
    model = Model(PARAMS["kernel"], jnp.arange(3), True)
    params, alone = eqx.filter(model, filtering), {"kernel": PARAMS["kernel"]}
    tx = row()
    state, expected_state = tx.init(params), tx.init(alone)
    for t in range(2):
        g = at(GRADIENTS, t)
        gradients = Model(g["kernel"], None, None)
        updates, state = tx.update(gradients, state, params)
        expected, expected_state = tx.update(
            {"kernel": g["kernel"]}, expected_state, alone
        )
        assert updates.calls is None
        assert updates.flag is None
        np.testing.assert_array_equal(updates.kernel, expected["kernel"])
        model = eqx.apply_updates(model, updates)
    np.testing.assert_array_equal(model.calls, jnp.arange(3))
    with pytest.raises((TypeError, ValueError), match="calls"):
        tx.update(Model(g["kernel"], jnp.arange(3), None), state, params)


@pytest.mark.slow
@every_row
def test_second_derivatives_where_units_are_dead(row):
    """A unit that never fires has gradients of 0, and a root of 0 has no derivative."""
    x = jnp.array([[1.0, 2.0], [0.5, 1.0]])
    start = jnp.array([[0.5, -1.0], [0.3, -2.0]])  # The second unit is dead.

    def loss(w):
        return jnp.sum(jnp.tanh(jax.nn.relu(x @ w)) ** 2)

    def after_three_steps(w):
        tx = row(**{row.eps: 0.0}) if row.eps in row.numbers else row()
        state = tx.init(w)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            w = w + updates
        return loss(w)

    first, second = jax.jit(
        lambda w: (jax.grad(after_three_steps)(w), jax.hessian(after_three_steps)(w))
    )(start)
    chex.assert_tree_all_finite((first, second))
    assert jnp.all(first[:, 1] == 0)
