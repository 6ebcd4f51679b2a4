# SPDX-License-Identifier: Apache-2.0
"""Arrays that are sharded like another array, also under `jax.jit`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike
from jax.typing import ArrayLike, DTypeLike


def full_like(x: Any, fill: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """``jnp.full_like``, sharded like ``x`` also where ``x`` is traced.

    A constant depends on no argument of a compiled function, so XLA would put the
    constant on one device (https://github.com/jax-ml/jax/issues/16679).
    """
    return like(x, jnp.full_like(x, fill, dtype=dtype))


def like(x: Any, array: jax.Array) -> jax.Array:
    """``array``, sharded like ``x`` of the same shape where ``x`` is traced."""
    if isinstance(x, Tracer):
        _, array = shard_alike(x, array)
    return array
