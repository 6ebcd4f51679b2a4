# SPDX-License-Identifier: Apache-2.0
"""Arrays that are sharded like another array, also under `jax.jit`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike


def full_like(x: Any, fill: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """``jnp.full_like``, sharded like ``x`` also where ``x`` is traced.

    A constant depends on no argument of a compiled function, so XLA would put the
    constant on one device (https://github.com/jax-ml/jax/issues/16679).
    """
    return like(x, jnp.full_like(x, fill, dtype=dtype))


def like(x: Any, array: jax.Array) -> jax.Array:
    """``array``, sharded like ``x`` of the same shape where ``x`` is traced."""
    if not isinstance(x, Tracer):
        return array
    # A choice between an array and itself. XLA shards the operands of an elementwise
    # operation alike, and drops this one later. For integers XLA drops x == x too soon.
    # (JAX 0.12 removed `jax.experimental.shard_alike`.)
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    return jnp.where(x == x, array, array)
