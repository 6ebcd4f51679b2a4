# SPDX-License-Identifier: Apache-2.0
"""A float32 master weight, kept as a half-precision weight and an integer residual."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optax_rms.storage._rounding import rounding_bits

# The ordinal of a master weight counts the magnitudes from 0 upward. The upper 15 bits
# are the weight without its sign, the lower 16 bits are the residual, which is signed:
#
#     weight   s eeeeeeee mmmmmmm                     bfloat16 (float16: 5 e, 10 m)
#     ordinal    eeeeeeee mmmmmmm 0000000000000000
#                              +  rrrrrrrrrrrrrrrr    residual of 16 bits
#                              +  rrrrrrrr00000000    residual of 8 bits
#
# For bfloat16 the ordinal is the bit pattern of a float32. For example the weight 1 is
# 0x3F80, and with the residual -3 the ordinal is 0x3F800000 - 3 = 0x3F7FFFFD, which is
# the float32 1 - 3 * 2^-24. For float16 the ordinal has 5 bits of exponent and 26 bits
# of mantissa, 3 more than a float32. The weight 1 is there 0x3C00.
_HALF_WEIGHT = 0x8000

# Bit patterns of float32: 2^-14, the least normal float16, and 2^16, the first number
# above all of them; and the difference of the exponent biases, 127 - 15, in place.
_F16_NORMAL = 113 << 23
_F16_TOP = 143 << 23
_F16_REBIAS = 112 << 23


@jax.jit
def join(weight: jax.Array, residual: jax.Array) -> jax.Array:
    """The master weight that a weight and its residual encode, a float32."""
    # 0xBF80, which is -1: as an int32, the sign bit is copied to all bits above.
    bits = jax.lax.bitcast_convert_type(weight, jnp.int16).astype(jnp.int32)
    # 0x3F80 -> 0x3F800000. The residual -3 comes to 0x3F7FFFFD.
    shift = 16 - jnp.iinfo(residual.dtype).bits
    ordinal = _weight_ordinal(bits) + (residual.astype(jnp.int32) << shift)
    # A weight of 0 may belong to a master weight of the other sign: the weight +0 with
    # the residual -3 is the master weight -3 * 2^-149.
    negative = (bits < 0) ^ (ordinal < 0)
    magnitude = _from_ordinal(jnp.abs(ordinal), weight.dtype)
    return jnp.where(negative, -magnitude, magnitude)


@functools.partial(jax.jit, static_argnames="in_own_dtype")
def advance(
    weight: jax.Array,
    residual: jax.Array,
    change: jax.Array,
    step: ArrayLike | None,
    leaf: ArrayLike,
    in_own_dtype: bool,
    seed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Add ``change`` to the master weight; return the update and the new residual.

    Args:
      weight: bfloat16 or float16.
      residual: int8 or int16, of the shape of ``weight``.
      change: the step of the master weight, of the shape of ``weight``.
      step: number of the update, for the random bits of residuals of 8 bits; ``None``
        with 16 bits, which are not rounded at random.
      leaf: number of the array, for the random bits.
      in_own_dtype: whether the update gets the dtype of the weight, or float32.
      seed: number of the run, for the random bits, or ``None``.
    """
    dtype = weight.dtype
    residual_bits = jnp.iinfo(residual.dtype).bits
    master = join(weight, residual) + change.astype(jnp.float32)
    # The new master weight 1 - 3 * 2^-24 has the ordinal 0x3F7FFFFD.
    ordinal = _to_ordinal(jnp.abs(master), dtype)
    if step is not None:
        # Stochastic rounding to a multiple of 0x100: here up, to 0x3F800000, with
        # probability 0xFD / 0x100, and down to 0x3F7FFF00 otherwise.
        noise = rounding_bits(weight.shape, step, leaf, seed) >> 24
        ordinal = (ordinal + noise.astype(jnp.int32)) & ~0xFF
    # The float32 of the new weight, here 1, and of the old weight.
    new = jnp.copysign(_nearest(ordinal, dtype), master)
    old = join(weight, jnp.zeros_like(residual))
    update = new - old
    if in_own_dtype:
        rounded = _nearest(_to_ordinal(jnp.abs(update), dtype), dtype)
        update = jnp.copysign(rounded, update)
    # An infinite or NaN master weight comes out of the sum as such.
    update = jnp.where(jnp.isfinite(master), update, master)
    # The sum of `optax.apply_updates`. It is ``new`` if ``new - old`` is a number of
    # the update's dtype: always, within a factor of 2 (Sterbenz, 1974). Elsewhere the
    # weight is the sum, and the residual corrects as much as fits in it. Summing in
    # float32 or in ``dtype`` is the same, since float32 has more than twice the
    # significant bits.
    landed = (old + update).astype(dtype)
    landed_bits = jax.lax.bitcast_convert_type(landed, jnp.int16).astype(jnp.int32)
    # 0x3F7FFFFD - 0x3F800000 = -3; negative if the signs differ, as in `join`.
    same_sign = (landed_bits < 0) == jnp.signbit(master)
    rest = jnp.where(same_sign, ordinal, -ordinal) - _weight_ordinal(landed_bits)
    rest = jnp.clip(rest, -_HALF_WEIGHT, _HALF_WEIGHT - 1)
    rest = jnp.where(jnp.isfinite(landed), rest, 0)
    residual = (rest >> (16 - residual_bits)).astype(residual.dtype)
    return update.astype(dtype) if in_own_dtype else update, residual


@functools.partial(jax.jit, static_argnames=("dtype", "residual_dtype"))
def split(
    master: jax.Array, dtype: DTypeLike, residual_dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """The weight and the residual that encode a float32 master weight.

    With 16 bits the inverse of `join`; with 8 bits, rounded to the nearest.
    """
    # -1 + 3 * 2^-24 is 0xBF7FFFFD: the sign 1, and the ordinal 0x3F7FFFFD.
    bits = jax.lax.bitcast_convert_type(master, jnp.uint32)
    magnitude = jax.lax.bitcast_convert_type(bits & 0x7FFFFFFF, jnp.float32)
    ordinal = _to_ordinal(magnitude, dtype)
    residual_bits = jnp.iinfo(residual_dtype).bits
    if residual_bits == 8:
        ordinal = (ordinal + 0x80) & ~0xFF
    # The upper half, rounded, is the weight 0x3F80, and the difference is -3.
    weight = (ordinal + _HALF_WEIGHT) >> 16
    rest = (ordinal - (weight << 16)) >> (16 - residual_bits)
    # Infinity has no residual. A NaN whose bits are all below would become infinity.
    special = _weight_bits(jnp.inf, dtype), _weight_bits(jnp.nan, dtype)
    rest = jnp.where(weight < special[0], rest, 0)
    weight = jnp.where(jnp.isnan(master), special[1], weight)
    rest = jnp.where(jnp.isnan(master), 0, rest)
    weight = weight.astype(jnp.uint16) | (bits >> 31 << 15).astype(jnp.uint16)
    weight = jax.lax.bitcast_convert_type(weight, jnp.dtype(dtype))
    return weight, rest.astype(residual_dtype)


def _weight_bits(value: float, dtype: DTypeLike) -> int:
    return int(np.asarray(value, dtype).view(np.uint16))


def _weight_ordinal(bits: jax.Array) -> jax.Array:
    """The ordinal of a weight with these bits and the residual 0."""
    return (bits & 0x7FFF) << 16


def _nearest(ordinal: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The number of ``dtype`` that is nearest to an ordinal, as a float32.

    For example 0x3F7FFFFD becomes 0x3F800000, the float32 1.
    """
    # Rounding an integer, since XLA may drop the round trip from float32 to bfloat16
    # and back (https://github.com/jax-ml/jax/issues/23007), and the residual with it.
    # `jax.lax.reduce_precision` stays, but makes subnormal numbers of float16 0.
    return _from_ordinal((ordinal + _HALF_WEIGHT) >> 16 << 16, dtype)


def _to_ordinal(magnitude: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The bits that a float32 has in ``dtype`` with 16 more mantissa bits."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    if dtype == jnp.bfloat16:
        return bits
    # 1 is 0x3F800000 -> 0x3F800000 - 0x38000000 = 0x07800000 -> 0x3C000000.
    normal = (jnp.minimum(bits, _F16_TOP) - _F16_REBIAS) << 3
    # Below 2^-14 the spacing stays: an ordinal counts multiples of 2^-24 * 2^-16.
    subnormal = jax.lax.round(
        magnitude * 2.0**40, jax.lax.RoundingMethod.TO_NEAREST_EVEN
    )
    return jnp.where(bits < _F16_NORMAL, subnormal.astype(jnp.int32), normal)


def _from_ordinal(ordinal: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The inverse of `_to_ordinal`, infinity and NaN included."""
    if dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(ordinal, jnp.float32)
    # 0x3C000000 -> 0x07800000 -> 0x07800000 + 0x38000000 = 0x3F800000, which is 1.
    # Infinity and NaN have the exponent 31 in float16 and 255 in float32: 224 more.
    special = ordinal >= (_F16_TOP - _F16_REBIAS) << 3
    rebias = jnp.where(special, 2 * _F16_REBIAS, _F16_REBIAS)
    normal = jax.lax.bitcast_convert_type((ordinal >> 3) + rebias, jnp.float32)
    # 1 << 26 is the least normal float16, 0x0400, with its residual of 16 bits.
    return jnp.where(ordinal < 1 << 26, ordinal.astype(jnp.float32) * 2.0**-40, normal)
