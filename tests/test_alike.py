# SPDX-License-Identifier: Apache-2.0
"""Constants that lie where an array lies, out of compiled functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_rms import _alike as alike

DTYPES = ["float32", "bfloat16", "complex64", "int8", "bool"]


def sharded(dtype):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))
    sharding = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    return jax.device_put(jnp.ones((8, 4), dtype), sharding)


@pytest.mark.parametrize("fill_dtype", ["float32", "uint8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_lies_where_the_array_lies(dtype, fill_dtype):
    x = sharded(dtype)

    def constant(x):
        return alike.full_like(x, 3, fill_dtype)

    made = jax.jit(constant)
    for y in (constant(x), made(x)):
        assert y.sharding == x.sharding
        assert y.dtype == fill_dtype
        assert np.all(np.asarray(y) == 3)
    # The array is a parameter of the program, and nothing reads it.
    assert "compare" not in str(made.lower(x).compile().as_text())
    # Otherwise a constant lies on one device, and the test shows nothing.
    plain = jax.jit(lambda x: jnp.full_like(x, 3, dtype=fill_dtype))(x)
    assert plain.sharding != x.sharding


def test_nan_does_not_spread():
    y = jax.jit(lambda x: alike.full_like(x, 3.0, "float32"))(jnp.full(2, jnp.nan))
    assert np.all(np.asarray(y) == 3)
