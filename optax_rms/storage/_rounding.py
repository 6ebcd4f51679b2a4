# SPDX-License-Identifier: Apache-2.0
"""Random bits for stochastic rounding, a hash of element, array and step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def rounding_bits(
    shape: tuple[int, ...], step: ArrayLike, leaf: ArrayLike
) -> jax.Array:
    """Random bits for every element of an array: a hash of element, step and leaf.

    The same three numbers give the same bits on any device and under any sharding, so
    there is no key to carry along and a resumed run repeats the one it continues.

    Args:
      shape: shape of the array; its elements count in row-major order.
      step: an integer that must never repeat for the same leaf, modulo 2^32.
      leaf: an integer for each array that is rounded at the same step.

    Returns:
      A uint32 array of that shape.

    Example:
      >>> from optax_rms.storage._rounding import rounding_bits
      >>> bits = rounding_bits((1000, 1000), step=1, leaf=0)
      >>> print((bits / 2.0**32).mean().round(2))
      0.5
      >>> print((bits == rounding_bits((1000, 1000), step=2, leaf=0)).sum())
      0
    """
    step, leaf = jnp.asarray(step, jnp.uint32), jnp.asarray(leaf, jnp.uint32)
    first = _mix(_mix(step + _GOLDEN) + leaf)
    x = jnp.full(shape, first)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        x += index * np.uint32(stride * int(_GOLDEN) % 2**32)
        stride *= shape[axis]
    x ^= x >> 15
    # Without a second word the bits of two steps would be the same but for a shift.
    x = (x ^ _mix(first + _GOLDEN)) * np.uint32(0x85EBCA77)
    return x ^ (x >> 15)


# Odd, and 2^32 / golden ratio: multiples of it are spread evenly.
_GOLDEN = np.uint32(0x9E3779B1)


def _mix(x):
    """The finalizer of MurmurHash3: each bit of the result depends on all of ``x``."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
