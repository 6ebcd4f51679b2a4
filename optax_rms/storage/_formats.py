# SPDX-License-Identifier: Apache-2.0
"""Storage formats of one or two bytes per element."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


@dataclasses.dataclass(frozen=True)
class Minifloat:
    r"""A floating-point format of one or two bytes, with stochastic rounding.

    With :math:`M = 2^{\text{mantissa_bits}}` and :math:`l = \text{lowest_exponent}`,
    the magnitudes of the codes :math:`c = 0, 1, 2, \ldots` are

    .. math::
      2^l \left( 2^{\lfloor c / M \rfloor} (1 + (c \bmod M) / M) - 1 \right).

    These are :math:`M` equal steps in each octave of :math:`|x| + 2^l`: 0 is exact, far
    above :math:`2^l` the format is an ordinary float, and below it the steps stay
    :math:`2^l / M`, which is gradual underflow. With ``lowest_exponent=-127`` the codes
    are the leading bits of the float32, whose own gradual underflow they inherit.

    `encode` rounds to one of the two neighbouring codes, and to the upper code with the
    probability that makes the mean exact: for example 1.1 becomes 1.25 with probability
    0.4, and 1 otherwise. A moving average can therefore be stored in steps that are far
    larger than its increments. Encoding and decoding are a few integer operations on
    each element alone: codes have the shape and the sharding of the decoded array, and
    elements share no scales.

    ======================  ===========  ==============  ===========  ==============
    format                  `UE6M2`      `UE8M8`         `SE5M2`      `SE8M7`
    ======================  ===========  ==============  ===========  ==============
    bytes per element       1            2               1            2
    window, powers of 2     -46 to 18    all of float32  -28 to 4     all of float32
    worst relative error    25 %         0.4 %           25 %         0.8 %
    bias                    0            0               0            0
    noise at decay 0.9      0.095        0.0014          0.17         0.005
    noise at decay 0.99     0.138        0.0042          0.57         0.017
    noise at decay 0.999    0.146        0.0130
    ======================  ===========  ==============  ===========  ==============

    * Window: from :math:`2^l` to :math:`2^l \cdot 2^{2^{\text{exponent_bits}}}`.
      Numbers beyond `largest`, for example infinity, and NaN get the code of `largest`,
      with the sign of the number; negative numbers become 0 if the format is not
      ``signed``.
    * Worst error: one step, at most :math:`(|x| + 2^l) / M`.
    * Bias: :math:`E[\text{decode}(\text{encode}(x))] = x` up to `largest`, to the
      float32 precision of :math:`x + 2^l`.
    * Noise of a second moment, unsigned: standard deviation of :math:`\log \sqrt{v}`
      for a moving average :math:`v` of squares of Gaussian numbers, measured against
      float32. The limit as the decay approaches 1, which is also the largest noise, is
      :math:`\sqrt{0.35 / M} / 2`: 0.148 and 0.018. Noise :math:`\sigma` raises the
      mean of :math:`1 / \sqrt{v}`, the length of an optimizer's steps, by
      :math:`1.5 \sigma^2`: by 1 to 3 % for `UE6M2`. Where the gradients of a network
      faded, up to 9 % were measured, and 13 % where they left the window.
    * Noise of a first moment, signed: root mean square error of a moving average of
      Gaussian numbers, measured, as a fraction of the root mean square of the average.
      The more a mean cancels, the more the error counts.

    `SE8M7` is bfloat16 and is stored as such.

    Where gradients are sparse or fade away, most updates of a moving average are only
    multiplications by the decay, and each is rounded. If the format has that ``decay``,
    its levels become smaller by the same factor at every step, and larger by an octave
    whenever they are an octave too small, so that a number that only decays keeps its
    code. At decay 0.999 and with 1 % of the gradients nonzero, the noise of `UE6M2`
    falls from 0.18 to 0.08; while gradients fall by a factor of 1000, from 0.46 to
    0.15. Dense, steady gradients gain nothing, and constant gradients lose (0.04 to
    0.15).

    Args:
      exponent_bits: 1 to 8.
      mantissa_bits: at least 0; together with exponent and sign they fill 8 or 16 bits.
      lowest_exponent: -127, or ``mantissa_bits - 126`` to 127.
      signed: whether a bit is spent on the sign.
      decay: factor by which the levels become smaller at each step, in (0, 1]; 1 for
        fixed levels.

    Raises:
      TypeError: an exponent or a number of bits is not an int.
      ValueError: an argument is out of its range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_rms
      >>> x = jnp.full(100_000, 1.1)
      >>> bits = jax.random.bits(jax.random.key(0), x.shape, jnp.uint32)
      >>> code = optax_rms.UE6M2.encode(x, bits)
      >>> code.nbytes
      100000
      >>> values = optax_rms.UE6M2.decode(code)
      >>> print(jnp.unique(values), values.mean().round(2))
      [1.   1.25] 1.1
    """

    exponent_bits: int
    mantissa_bits: int
    lowest_exponent: int
    signed: bool = False
    decay: float = 1.0

    def __post_init__(self):
        numbers = self.exponent_bits, self.mantissa_bits, self.lowest_exponent
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError(
                "exponent_bits, mantissa_bits and lowest_exponent must be of type int, "
                f"got {numbers}."
            )
        bits = self._magnitude_bits + self.signed
        if not (1 <= self.exponent_bits <= 8 and self.mantissa_bits >= 0) or (
            bits not in (8, 16)
        ):
            raise ValueError(
                "exponent_bits (1 to 8), mantissa_bits (at least 0) and the sign bit "
                f"must fill 8 or 16 bits, got {self.exponent_bits} + "
                f"{self.mantissa_bits} + {int(self.signed)} = {bits}."
            )
        low = self._lowest_normal
        if self.lowest_exponent != -127 and not low <= self.lowest_exponent <= 127:
            raise ValueError(
                f"lowest_exponent must be -127 or lie in [{low}, 127], got "
                f"{self.lowest_exponent}."
            )
        if not (isinstance(self.decay, float | int) and 0 < self.decay <= 1):
            raise ValueError(f"decay must be a number in (0, 1], got {self.decay!r}.")

    @property
    def name(self) -> str:
        """All fields in one word, such as ``"UE6M2@-46"`` or ``"UE6M2@-46*0.9"``."""
        sign = "S" if self.signed else "U"
        bits = f"E{self.exponent_bits}M{self.mantissa_bits}"
        decay = "" if self.decay == 1 else f"*{float(self.decay)!r}"
        return f"{sign}{bits}@{self.lowest_exponent}{decay}"

    @classmethod
    def from_name(cls, name: str) -> "Minifloat":
        """The format that has this `name`."""
        match = re.fullmatch(r"([SU])E(\d)M(\d+)@(-?\d+)(?:\*([-.e\d]+))?", name)
        if match is None:
            raise ValueError(f"name must look like 'UE6M2@-46', got {name!r}.")
        sign, *numbers, decay = match.groups()
        return cls(*map(int, numbers), signed=sign == "S", decay=float(decay or 1))

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the codes (uint8, uint16, or bfloat16, if the format is that)."""
        if self.signed and self.exponent_bits == 8 and self.lowest_exponent == -127:
            return jnp.dtype(jnp.bfloat16)
        return self._code_dtype

    @property
    def largest(self) -> float:
        """The largest magnitude with a code (half of this, for lowered levels)."""
        pattern = np.uint32((self._top_code << self._shift) + self._base)
        return float(pattern.view(np.float32) - self._offset)

    def for_eps(self, eps: float, eps_in_sqrt: bool = True) -> "Minifloat":
        """The format whose window begins where a mean square is lost in ``eps``.

        With ``eps`` inside the root, the window begins at the power of two below
        ``eps``: relative to ``v + eps`` the steps below the window are then no larger
        than relative to ``v`` above. With ``eps`` outside, the window begins at 1/16 of
        ``eps**2``, because the root magnifies the steps near 0. If `largest` is then
        too small for the squares of the gradients, choose ``lowest_exponent`` with
        ``dataclasses.replace``, or two bytes.

        Args:
          eps: positive.
          eps_in_sqrt: whether ``eps`` sits inside the root.

        Example:
          >>> import optax_rms
          >>> optax_rms.UE6M2.for_eps(1e-8).name
          'UE6M2@-27'
          >>> optax_rms.UE6M2.for_eps(1e-8, eps_in_sqrt=False).name
          'UE6M2@-58'
        """
        if not (isinstance(eps, float | int) and 0 < eps < math.inf):
            raise ValueError(
                f"eps must be a positive finite Python number, got {eps!r}; otherwise "
                "set lowest_exponent with dataclasses.replace."
            )
        log2_eps = math.log2(eps)
        exponent = math.floor(log2_eps if eps_in_sqrt else 2 * log2_eps - 4)
        exponent = min(max(exponent, self._lowest_normal), 127)
        return dataclasses.replace(self, lowest_exponent=exponent)

    def encode(self, x: ArrayLike, bits: ArrayLike, step: ArrayLike = 0) -> jax.Array:
        """Round to one of the two neighbouring codes, unbiased for uniform ``bits``.

        Args:
          x: float32 values, or values of a narrower floating dtype.
          bits: uint32, of a shape that broadcasts to that of ``x``; the constant
            ``2**31`` rounds to nearest.
          step: the step at which to decode, if the format has a ``decay``.

        Returns:
          The codes, of the shape of ``x``, in `dtype`.
        """
        # Layout, for UE6M2 and the value 1.1, that is 0x3F8CCCCD:
        #
        #     float32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
        #     code         eeeeee  mm                        uint8
        #
        # The code counts steps of the upper bits from the pattern of 2^lowest_exponent,
        # which is 0x28800000; the lower 21 bits are the fraction of a step.
        x = jnp.asarray(x, jnp.float32)
        if self.decay < 1:
            x = x * jnp.exp2(self._lowered_octaves(step))
        magnitude = jnp.abs(x) if self.signed else jnp.where(x < 0, 0, x)
        # Gradual underflow: 0 gets the pattern of 2^lowest_exponent, and the code 0.
        if self._offset:
            magnitude = magnitude + self._offset
        # As an integer, a NaN or a -0 with its sign bit would be huge. The NaN of x86
        # has it. 0x3F8CCCCD - 0x28800000 = 0x170CCCCD.
        steps = (_bitcast(magnitude, jnp.uint32) & 0x7FFFFFFF) - self._base
        steps = jnp.minimum(steps, self._top_code << self._shift)
        # 0x170CCCCD is 184.4 steps of 2^21: the carry of random bits below 2^21 makes
        # it 185, which is 1.25, with probability 0.4, and 184, which is 1, otherwise.
        fraction = jnp.asarray(bits, jnp.uint32) >> (32 - self._shift)
        code = (steps + fraction) >> self._shift
        if self.signed:
            code |= (_bitcast(x, jnp.uint32) >> 31) << self._magnitude_bits
        return _bitcast(code.astype(self._code_dtype), self.dtype)

    def decode(self, code: ArrayLike, step: ArrayLike = 0) -> jax.Array:
        """The float32 values of the codes.

        If the format has no ``decay``, encoding them again gives the same codes,
        whatever the bits.
        """
        # The way of `encode` back. For UE6M2 the code 185 is 0x17200000, the pattern
        # 0x17200000 + 0x28800000 = 0x3FA00000 and the value 1.25.
        code = _bitcast(jnp.asarray(code, self.dtype), self._code_dtype)
        code = code.astype(jnp.uint32)
        steps = (code & ((1 << self._magnitude_bits) - 1)) << self._shift
        x = _bitcast(steps + self._base, jnp.float32)
        if self._offset:
            x = x - self._offset
        if self.signed:
            sign = (code >> self._magnitude_bits) << 31
            x = _bitcast(_bitcast(x, jnp.uint32) | sign, jnp.float32)
        if self.decay < 1:
            x = x * jnp.exp2(-self._lowered_octaves(step))
        return x

    def _lowered_octaves(self, step: ArrayLike) -> jax.Array:
        """By how much the levels are lowered, in octaves between 0 and 1."""
        # In units of 2^-32 octaves, unsigned integers wrap where an octave is full. For
        # decay 0.5 the rate is 2^32, that is 0: each step is a whole octave.
        rate = np.uint32(round(-math.log2(self.decay) * 2**32) % 2**32)
        phase = jnp.asarray(step, jnp.uint32) * rate
        return phase.astype(jnp.float32) * np.float32(2**-32)

    @property
    def _magnitude_bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits

    @property
    def _code_dtype(self) -> np.dtype:
        bits = self._magnitude_bits + self.signed
        return jnp.dtype(jnp.uint8 if bits == 8 else jnp.uint16)

    @property
    def _shift(self) -> int:
        """How many bits of a float32 the format drops."""
        return 23 - self.mantissa_bits

    @property
    def _lowest_normal(self) -> int:
        """The lowest window whose steps are normal numbers.

        On CPUs, JAX makes subnormal numbers 0: https://github.com/jax-ml/jax/issues/16200
        """
        return self.mantissa_bits - 126

    @property
    def _base(self) -> int:
        """The float32 bit pattern of code 0."""
        return (self.lowest_exponent + 127) << 23

    @property
    def _offset(self) -> np.float32:
        return np.uint32(self._base).view(np.float32)

    @property
    def _top_code(self) -> int:
        # Codes end where they are used up, or below the infinity of float32.
        infinity = (0x7F800000 - self._base) >> self._shift
        return min(1 << self._magnitude_bits, infinity) - 1


UE6M2 = Minifloat(exponent_bits=6, mantissa_bits=2, lowest_exponent=-46)
UE8M8 = Minifloat(exponent_bits=8, mantissa_bits=8, lowest_exponent=-127)
SE5M2 = Minifloat(exponent_bits=5, mantissa_bits=2, lowest_exponent=-28, signed=True)
SE8M7 = Minifloat(exponent_bits=8, mantissa_bits=7, lowest_exponent=-127, signed=True)


def _bitcast(x: ArrayLike, dtype: DTypeLike) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, dtype)
