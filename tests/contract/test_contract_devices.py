# SPDX-License-Identifier: Apache-2.0
"""The contract with meshes: types on explicit meshes, and steps inside of shards."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.contract_rows import every_row
from helpers.running import step
from helpers.training import GRADIENTS, PARAMS, assert_close, plain
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def types(tree):
    """Shape, dtype and sharding, as the type of an array on an explicit mesh has it."""
    typed = jax.tree.map(
        lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x), tree
    )
    return jax.tree.map(lambda t: (t.shape, t.dtype, t.weak_type, spec(t)), typed)


def spec(t):
    """A scalar that depends on no array of the mesh is on no mesh."""
    return tuple(t.sharding.spec) if t.sharding is not None else ()


# Optax' tests leave these versions out as well.
@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="jax.eval_shape of JAX 0.6 has no shardings"
)
@every_row
def test_types_on_an_explicit_mesh(row):
    """The cases of Optax' own sharding tests, on the parameters of these."""
    axes = (AxisType.Explicit,)
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=axes)
    tx = row()
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec(None, "x"))
        params = jax.device_put(jnp.zeros((2, 8, 4), jnp.float16), sharding)
        state = tx.init(params)
        expected = types(state)
        assert types(jax.eval_shape(tx.init, params)) == expected
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert types(after) == expected
        assert types(updates) == types(params)
    shapes = [t for t in jax.tree.leaves(state) if t.ndim]
    assert shapes
    for x in shapes:
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.slow
@every_row
def test_inside_of_shards(row):
    """`jax.shard_map`, which checks what varies among shards: numbers of one device."""
    # JAX 0.6 has it elsewhere.
    home = jax if hasattr(jax, "shard_map") else "jax.experimental.shard_map"
    home = importlib.import_module(home) if isinstance(home, str) else home
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    tx = row()

    def train(params, gradients):
        state = tx.init(params)
        for t in range(2):
            g = jax.tree.map(lambda g, t=t: g[t], gradients)
            params, state = step(tx, params, state, g)
        return params

    inside = home.shard_map(
        train,
        mesh=mesh,
        in_specs=(PartitionSpec("x"), PartitionSpec(None, "x")),
        out_specs=PartitionSpec("x"),
    )
    expected = jax.tree.map(lambda x: x[1], plain(row).params)
    assert_close(jax.jit(inside)(PARAMS, GRADIENTS), expected)
