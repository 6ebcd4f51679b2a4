# SPDX-License-Identifier: Apache-2.0
"""Random bits for stochastic rounding, a hash of element, array and step."""

from collections.abc import Hashable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Number of the first weight that `split_master_weights` rounds. The moments that an
# inner `compress_state` rounds at the same step are numbered from 0: with random bits
# in common, a weight would be rounded up whenever its moment is.
WEIGHT_STREAM = 1 << 30


def rounding_bits(
    shape: tuple[int, ...],
    step: ArrayLike,
    leaf: ArrayLike,
    seed: ArrayLike | None = None,
) -> jax.Array:
    """Random bits for every element of an array: a hash of element, step and leaf.

    The same numbers give the same bits on any device and under any sharding. So
    there is no key to store, and a resumed run has the bits of an uninterrupted run.

    Args:
      shape: shape of the array; its elements count in row-major order.
      step: an integer that must never repeat for the same leaf, modulo 2^32.
      leaf: an integer for each array that is rounded at the same step.
      seed: an integer for each run that is to have bits of its own, or ``None``.

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
    # The hash of step and array is the start of the sequence of this array.
    step, leaf = jnp.asarray(step, jnp.uint32), jnp.asarray(leaf, jnp.uint32)
    first = _mix(_mix(step + _GOLDEN) + leaf)
    if seed is not None:
        # Added to a hash of the step: added to the step itself, the seed would make the
        # bits of one run those of another run at another time.
        first = _mix(first + _mix(jnp.asarray(seed, jnp.uint32) + _GOLDEN))
    # The element number i, in row-major order, adds i * golden: a Weyl sequence. Each
    # axis adds its part, so that a shard needs its own index only.
    x = jnp.full(shape, first)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        x += index * np.uint32(stride * int(_GOLDEN) % 2**32)
        stride *= shape[axis]
    x ^= x >> 15
    # Without a second word of the hash, the bits of two steps would be shifted copies.
    x = (x ^ _mix(first + _GOLDEN)) * np.uint32(0x85EBCA77)
    return x ^ (x >> 15)


def leaf_numbers(
    kinds: Mapping[int, Hashable], runtime: bool | jax.Array
) -> dict[int, ArrayLike]:
    """The number of each leaf for `rounding_bits`, as a uint32 scalar.

    A number that XLA knows is a constant in the loop of its array. XLA for a CPU then
    compiles a loop for each array in place of one for each kind of array. A choice
    between the number and 0 hides the number until the program runs.

    Args:
      kinds: for each number, the kind of its array; arrays of one kind have one loop.
      runtime: a bool scalar, not known when the program is compiled, that is false
        only if the bits do not matter; or ``True``.

    Returns:
      The numbers, by themselves.
    """
    numbers: dict[int, ArrayLike] = {number: np.uint32(number) for number in kinds}
    if runtime is True or len(set(kinds.values())) == len(kinds):
        return numbers

    def known(_=None):
        return jax.tree.map(jnp.asarray, numbers)

    def hidden(runtime):
        return jax.lax.cond(
            runtime, known, lambda: jax.tree.map(jnp.zeros_like, numbers)
        )

    return jax.lax.platform_dependent(runtime, cpu=hidden, default=known)


# Odd, and 2^32 / golden ratio: multiples of it are spread evenly.
_GOLDEN = np.uint32(0x9E3779B1)


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: each bit of the result depends on all of ``x``."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
