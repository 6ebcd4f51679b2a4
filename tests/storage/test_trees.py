# SPDX-License-Identifier: Apache-2.0
"""Parameters that are abstract, sharded, or no floating-point numbers at all."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from optax_rms import (
    SE5M2,
    UE6M2,
    compress_state,
    decompress_state,
    master_weights,
    rmsprop,
    split_master_weights,
)

PARTS = {"w": optax.adam(0.1), "b": optax.sgd(0.1)}
TRANSFORMATIONS = {
    "compressed": compress_state(rmsprop(0.1, momentum=0.9), nu=UE6M2, trace=SE5M2),
    "compressed adam": compress_state(optax.adam(0.1), nu=UE6M2),
    "compressed adagrad": compress_state(optax.adagrad(0.1), sum_of_squares=UE6M2),
    "compressed parts": compress_state(
        optax.partition(PARTS, {"w": "w", "b": "b"}), nu=UE6M2
    ),
    "split": split_master_weights(rmsprop(0.1, centered=True)),
    "split adam": split_master_weights(optax.adam(0.1), 16),
    "both": split_master_weights(compress_state(rmsprop(0.1), nu=UE6M2)),
}
over_transformations = pytest.mark.parametrize("name", TRANSFORMATIONS)
over_dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's bias correction fails under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def params(dtype):
    return {"w": jnp.ones((8, 6), dtype), "b": jnp.ones(8, dtype)}


def signature(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype) for x in leaves]


@over_dtypes
@over_transformations
def test_init_takes_shapes_and_dtypes_alone(name, dtype):
    tx, p = TRANSFORMATIONS[name], params(dtype)
    abstract = jax.eval_shape(lambda: p)
    expected = signature(tx.init(p))
    assert signature(tx.init(abstract)) == expected
    assert signature(jax.eval_shape(tx.init, abstract)) == expected


@over_dtypes
@over_transformations
def test_a_compiled_init_puts_the_state_where_the_parameters_are(name, dtype):
    """Also codes of uint8 and residuals of int8 and int16, for eight devices."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=auto)
    shardings = {
        "w": NamedSharding(mesh, PartitionSpec("x", "y")),
        "b": NamedSharding(mesh, PartitionSpec("x")),
    }
    p = jax.device_put(params(dtype), shardings)
    tx = TRANSFORMATIONS[name]
    state = jax.jit(tx.init)(p)
    arrays = [x for x in jax.tree.leaves(state) if x.ndim > 0]
    assert arrays
    for x in arrays:
        expected = shardings["w" if x.ndim == 2 else "b"]
        assert x.sharding.is_equivalent_to(expected, x.ndim)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(tx.init(p)), strict=True):
        np.testing.assert_array_equal(x, y)


class Model(eqx.Module):
    """With a counter and a mask, which `equinox.is_array` keeps."""

    w: jax.Array
    steps: jax.Array
    mask: jax.Array


@over_dtypes
@pytest.mark.parametrize("name", [n for n in TRANSFORMATIONS if "parts" not in n])
def test_integer_leaves_are_left_alone(name, dtype):
    """As Equinox' documentation trains: gradients are None where nothing is trained."""
    tx = TRANSFORMATIONS[name]
    model = Model(jnp.ones((4, 3), dtype), jnp.int32(7), jnp.array([True, False]))
    state = tx.init(eqx.filter(model, eqx.is_array))
    expected = {"w": model.w}
    alone = tx.init(expected)

    def loss(model):
        return jnp.sum(jnp.sin(model.w)).astype(jnp.float32)

    for _ in range(3):
        gradients = eqx.filter_grad(loss)(model)
        updates, after = tx.update(gradients, state, eqx.filter(model, eqx.is_array))
        assert (updates.steps, updates.mask) == (None, None)
        assert signature(after) == signature(state)
        model, state = eqx.apply_updates(model, updates), after
        updates, alone = tx.update({"w": gradients.w}, alone, expected)
        expected = optax.apply_updates(expected, updates)
    assert model.steps == 7
    np.testing.assert_array_equal(model.mask, [True, False])
    assert model.w.dtype == dtype
    np.testing.assert_array_equal(model.w, expected["w"])
    if "split" in name or name == "both":
        masters = master_weights(eqx.filter(model, eqx.is_array), state)
        assert masters.steps.dtype == jnp.int32
    else:
        wide = decompress_state(state)
        assert {x.dtype.itemsize for x in jax.tree.leaves(wide)} <= {2, 4}


@over_transformations
def test_a_gradient_of_an_integer_is_an_error_with_advice(name):
    tx = TRANSFORMATIONS[name]
    p = {"w": jnp.ones((8, 6)), "b": jnp.ones(8, jnp.int32)}
    if "parts" not in name:
        with pytest.raises(TypeError, match=r"\['b'\] \(int32\).*is_inexact_array"):
            tx.update(p, tx.init(p), p)


@pytest.mark.parametrize("inner", [optax.rmsprop(0.1), rmsprop(0.1)])
def test_without_a_gradient_codes_stay(inner):
    tx = compress_state(inner, nu=UE6M2)
    p = params(jnp.float32)
    _, state = tx.update(p, tx.init(p), p)
    updates, after = tx.update(p | {"w": None}, state, p)
    assert updates["w"] is None
    assert signature(after) == signature(state)
    nu, nu_after = (optax.tree.get(s, "nu") for s in (state, after))
    np.testing.assert_array_equal(nu_after["w"], nu["w"])
    assert np.any(np.asarray(nu_after["b"]) != np.asarray(nu["b"]))
