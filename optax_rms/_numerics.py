# SPDX-License-Identifier: Apache-2.0
"""Numerics that several modules share: guarded functions, casts and widening."""

from typing import Any

import jax
import jax.numpy as jnp


def cast(x, dtype):
    """``x.astype(dtype)``, without the time to trace it where it does nothing."""
    return x if x.dtype == dtype else x.astype(dtype)


def zero_at_zero(function):
    """``function`` with value 0 and derivative 0 at 0, where ``function`` is singular.

    For example, the derivative of ``jnp.sqrt`` at 0 is infinite.
    """

    def guarded(x):
        zero = x == 0
        # The inner selection keeps the infinite derivative out of reverse mode, which
        # would multiply it by 0 and get NaN.
        y = function(jax.lax.select(zero, jnp.ones_like(x), x))
        return jax.lax.select(zero, jnp.zeros_like(x), y)

    return guarded


def is_half(leaf: Any) -> bool:
    """Whether a leaf is a real array of fewer than 32 bits."""
    dtype = getattr(leaf, "dtype", None)
    return (
        dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    )


def widen(x: Any) -> jax.Array:
    """An array of at least float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if is_half(x) else x
