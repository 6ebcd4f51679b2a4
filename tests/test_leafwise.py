# SPDX-License-Identifier: Apache-2.0
"""Steps that are not RMSProp, chained: the bookkeeping around the arithmetic."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.trajectory import x64

from optax_rms import _leafwise as leafwise


@pytest.fixture
def add():
    """A leaf function, new and not compiled yet, that lists what it is traced for."""

    def add(g, increment, total):
        add.traced.append((g.shape, g.dtype, total.dtype))
        total = total + g + increment.astype(g.dtype)
        return total, total

    add.traced = []
    return add


def _scale(g, factor):
    return (factor.astype(g.dtype) * g,)


def adding(leaf, increment=0.0, accumulator_dtype=None):
    """Add the gradient and the increment to a total, which is the update."""
    start = functools.partial(leafwise.accumulator, dtype=accumulator_dtype)
    return leafwise.Step(
        optax.TraceState, leaf, lambda count: increment, fields={"trace": start}
    )


def scaling(factor):
    return leafwise.Step(optax.EmptyState, _scale, lambda count: factor)


def test_steps_run_in_order_and_each_keeps_its_state(add):
    tx = leafwise.chain(adding(add, 1.0), scaling(10.0), adding(add))
    g = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    state = tx.init(g)
    chain = optax.chain(optax.trace(1.0), optax.scale(10.0), optax.trace(1.0))
    chex.assert_trees_all_equal_structs(state, chain.init(g))
    update, state = tx.update(g, state)
    update, state = tx.update(g, state)
    # First sum 2 then 4; second sum 20 then 20 + 40.
    np.testing.assert_array_equal(update["a"], [60.0, 90.0])
    np.testing.assert_array_equal(update["b"], 120.0)
    np.testing.assert_array_equal(state[0].trace["b"], 8.0)
    np.testing.assert_array_equal(state[2].trace["a"], [60.0, 90.0])


def test_single_is_a_chain_of_one_without_its_tuple(add):
    single, chain = leafwise.single(adding(add, 1.0)), leafwise.chain(adding(add, 1.0))
    g = jnp.array([1.0, 2.0])
    state = single.init(g)
    assert isinstance(state, optax.TraceState)
    update, state = single.update(g, state)
    expected, (expected_state,) = chain.update(g, chain.init(g))
    np.testing.assert_array_equal(update, expected)
    np.testing.assert_array_equal(state.trace, expected_state.trace)


def test_one_trace_for_each_shape_and_dtype(add):
    tx = leafwise.chain(adding(add))
    shapes = [(2,), (2, 3)]
    g = [jnp.ones(s, d) for s in shapes for d in ("float32", "bfloat16")] * 5
    step = jax.jit(tx.update)
    _, state = step(g, tx.init(g))
    step(g, state)
    assert len(add.traced) == 4
    # Another transformation from the same function, with other numbers, shares it.
    other = leafwise.chain(adding(add, 7.0))
    other.update(g, other.init(g))
    assert len(add.traced) == 4


def test_a_shape_that_occurs_once_is_part_of_the_step(add):
    """A function of its own would take longer to trace and lower."""
    tx = leafwise.chain(adding(add))
    g = [jnp.ones(2), jnp.ones(2), jnp.ones(3), None, None]
    program = jax.make_jaxpr(tx.update)(g, tx.init(g))
    calls = [e.params["jaxpr"] for e in program.eqns if "jaxpr" in e.params]
    assert len(calls) == 2
    assert {v.aval.shape for call in calls for v in call.jaxpr.outvars} == {(2,)}


def test_none_passes_all_steps_and_leaves_their_states_alone(add):
    tx = leafwise.chain(adding(add, 1.0), adding(add, 1.0))
    g = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update(g, tx.init(g))
    update, next_state = tx.update({"a": jnp.ones(2), "b": None}, state)
    assert update["b"] is None
    for before, after in zip(state, next_state, strict=True):
        np.testing.assert_array_equal(after.trace["b"], before.trace["b"])
        assert (after.trace["a"] != before.trace["a"]).all()


@pytest.mark.parametrize(
    ("dtype", "accumulator_dtype", "computed"),
    [
        ("bfloat16", None, "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("float32", "float16", "float32"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("complex64", None, "complex64"),
        ("complex64", "float64", "complex128"),
        ("complex128", None, "complex128"),
    ],
)
@x64()
def test_arithmetic_is_in_the_widest_precision_of_its_leaf(
    add, dtype, accumulator_dtype, computed
):
    tx = leafwise.chain(adding(add, accumulator_dtype=accumulator_dtype))
    g = {"one": jnp.ones(2, dtype), "other": jnp.ones(3, "float32")}
    state = tx.init(g)
    update, (next_state,) = tx.update(g, state)
    assert add.traced[0] == ((2,), computed, computed)
    assert update["one"].dtype == dtype
    assert next_state.trace["one"].dtype == state[0].trace["one"].dtype


def test_nothing_is_rounded_between_steps(add):
    """1 + 1e-3 is 1 in bfloat16, and would be 1 again after each of two steps."""
    tx = leafwise.chain(scaling(1 + 1e-3), scaling(1e3), scaling(1e-3))
    g = jnp.ones(2, jnp.bfloat16)
    expected = jnp.full(2, 1.001).astype(jnp.bfloat16)
    np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], expected)
    tx = leafwise.chain(scaling(1 + 1e-3), adding(add, -1.0))
    update, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(update.astype(jnp.float32), 1e-3, rtol=2**-8)


@pytest.mark.parametrize(
    ("param", "dtype", "real", "expected"),
    [
        ("float32", None, False, "float32"),
        ("bfloat16", None, False, "float32"),
        ("float16", "bfloat16", False, "bfloat16"),
        ("float64", None, False, "float64"),
        ("complex64", None, False, "complex64"),
        ("complex64", None, True, "float32"),
        ("complex128", None, True, "float64"),
        ("complex64", "bfloat16", False, "complex64"),
        ("complex64", "bfloat16", True, "bfloat16"),
    ],
)
@x64()
def test_accumulator_has_shape_dtype_and_value(param, dtype, real, expected):
    tree = {"a": jnp.zeros((2, 3), param), "b": jnp.zeros((), param)}
    made = leafwise.accumulator(tree, 0.5, dtype, real=real)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(expected)}
    assert not any(x.weak_type for x in jax.tree.leaves(made))
    np.testing.assert_array_equal(made["a"], jnp.full((2, 3), 0.5, expected))
    assert made["b"].shape == ()


def test_accumulator_keeps_the_sharding_of_its_parameter():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    p = jax.device_put(jnp.zeros((8, 2), jnp.bfloat16), sharding)
    for fill in (0.0, jnp.array(1.0)):
        assert leafwise.accumulator(p, fill).sharding == sharding


def test_wrong_shapes_stop_before_anything_runs(add):
    tx = leafwise.chain(adding(add))
    state = tx.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\['b'\] has shape \(1,\)"):
        tx.update({"a": jnp.ones(2), "b": jnp.ones(1)}, state)
    assert not add.traced


def test_params_are_not_looked_at(add):
    tx = leafwise.chain(adding(add))
    g = jnp.ones(2)
    update = functools.partial(tx.update, g, tx.init(g))
    np.testing.assert_array_equal(update(None)[0], update(object())[0])
