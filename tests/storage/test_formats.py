# SPDX-License-Identifier: Apache-2.0
"""Formats against their definition, code by code, and the quality of rounding bits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_rms.storage._formats import (
    SE5M2,
    SE8M7,
    UE6M2,
    UE8M8,
    Minifloat,
)
from optax_rms.storage._rounding import _GOLDEN, _mix, rounding_bits

FORMATS = [
    UE6M2,
    UE8M8,
    SE5M2,
    SE8M7,
    UE6M2.for_eps(1e-8),
    UE6M2.for_eps(1e-8, eps_in_sqrt=False),
    Minifloat(5, 3, -31),
    Minifloat(7, 1, -64),
    Minifloat(6, 2, 100),  # the window ends above the largest float32
    Minifloat(6, 2, -124),  # the lowest window with an offset
    Minifloat(8, 8, -118),
    Minifloat(1, 15, 5),
    Minifloat(6, 1, -50, signed=True),
    Minifloat(4, 11, -14, signed=True),
    Minifloat(4, 3, -127, signed=True),
]
LARGEST_BITS = np.uint32(2**32 - 1)
HALF = np.uint32(2**31)

over_formats = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def integer_dtype(format):
    return np.dtype(f"uint{8 * format.dtype.itemsize}")


def sign_bit(format):
    return integer_dtype(format).type(1 << (8 * format.dtype.itemsize - 1))


def offset_of(format):
    return 0.0 if format.lowest_exponent == -127 else 2.0**format.lowest_exponent


def levels(format, codes):
    """What codes stand for, from the definition, in float64."""
    octave, position = np.divmod(codes.astype(np.float64), 2.0**format.mantissa_bits)
    fraction = position / 2.0**format.mantissa_bits
    if format.lowest_exponent == -127:  # a float32 without its last bits
        normal = 2.0 ** (octave - 127) * (1 + fraction)
        return np.where(octave == 0, 2.0**-126 * fraction, normal)
    return 2.0**format.lowest_exponent * (2.0**octave * (1 + fraction) - 1)


def magnitude_codes(format):
    """The codes of all numbers that are not negative, as integers."""
    bits = format.exponent_bits + format.mantissa_bits
    codes = np.arange(2**bits).astype(integer_dtype(format))
    return codes[levels(format, codes) <= np.finfo(np.float32).max]


def encode(format, x, bits):
    """Encode to integers; in arrays of one size, so that JAX compiles once for all."""
    padded = np.resize(np.float32(x), 2**16)
    return np.asarray(format.encode(padded, np.uint32(bits))).view(
        integer_dtype(format)
    )[: len(x)]


def decode(format, codes):
    """Decode integers to float64."""
    padded = np.resize(codes, 2**16).view(format.dtype)
    return np.asarray(format.decode(padded), np.float64)[: len(codes)]


@over_formats
def test_decode_follows_the_definition_for_every_code(format):
    codes = magnitude_codes(format)
    decoded = decode(format, codes)
    # Subtracting the offset rounds once: half a unit in the last place.
    np.testing.assert_allclose(decoded, levels(format, codes), rtol=2.0**-24, atol=0)
    assert decoded[0] == 0
    assert np.all(np.diff(decoded) > 0)
    assert decoded[-1] == format.largest
    if format.signed:
        negative = decode(format, codes | sign_bit(format))
        np.testing.assert_array_equal(negative, -decoded)


def test_formats_of_two_bytes_are_the_leading_bits_of_float32():
    assert SE8M7.dtype == jnp.bfloat16
    codes = magnitude_codes(SE8M7)
    codes = np.concatenate([codes, codes | sign_bit(SE8M7)])
    expected = codes.view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(decode(SE8M7, codes), expected)
    codes = magnitude_codes(UE8M8)
    expected = (codes.astype(np.uint32) << 15).view(np.float32)
    np.testing.assert_array_equal(decode(UE8M8, codes), expected)


@over_formats
def test_codes_survive_decoding_and_encoding_whatever_the_bits(format):
    codes = magnitude_codes(format)
    if format.signed:
        codes = np.concatenate([codes, codes | sign_bit(format)])
    values = decode(format, codes)
    random = np.random.default_rng(0).integers(2**32, size=8)
    for bits in [0, HALF, LARGEST_BITS, *random]:
        np.testing.assert_array_equal(encode(format, values, bits), codes)


def probes(format):
    """Numbers all over the window and beyond it, and next to levels."""
    level = levels(format, magnitude_codes(format))
    level = np.float32(level[:: max(1, level.size // 2000)])
    random = np.random.default_rng(0)
    anywhere = 2 ** random.uniform(max(np.log2(level[1]) - 10, -126), 127.99, 2000)
    values = [level, np.nextafter(level, np.inf), np.nextafter(level, 0), anywhere]
    values = np.float32(np.concatenate(values))
    # XLA takes numbers below this one for 0.
    return values[values >= np.finfo(np.float32).tiny]


@over_formats
def test_encode_rounds_down_up_and_to_nearest(format):
    x = probes(format)
    # The sum is rounded to float32 before it is compared with the levels.
    shifted = (x + np.float32(offset_of(format))).astype(np.float64)
    level = levels(format, magnitude_codes(format)) + offset_of(format)
    down = np.searchsorted(level, shifted, side="right") - 1
    up = np.minimum(np.searchsorted(level, shifted, side="left"), level.size - 1)
    nearest = np.where(shifted - level[down] < level[up] - shifted, down, up)
    for bits, expected in [(0, down), (LARGEST_BITS, up), (HALF, nearest)]:
        np.testing.assert_array_equal(encode(format, x, bits), expected)
        if format.signed:
            negative = encode(format, -x, bits)
            np.testing.assert_array_equal(negative, expected | sign_bit(format))


@over_formats
def test_what_is_too_large_saturates_and_never_wraps(format):
    top = magnitude_codes(format)[-1]
    above = np.nextafter(np.float32(format.largest), np.float32(np.inf))
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    negative = np.array([-format.largest, -3.4e38, -np.inf])
    for bits in [0, 1, HALF, LARGEST_BITS]:
        codes = encode(format, [format.largest, above, 3.4e38, np.inf], bits)
        np.testing.assert_array_equal(codes, top)
        codes = encode(format, nan, bits)
        magnitude = codes & ~sign_bit(format) if format.signed else codes
        np.testing.assert_array_equal(magnitude, top)
        codes = encode(format, negative, bits)
        expected = top | sign_bit(format) if format.signed else 0
        np.testing.assert_array_equal(codes, expected)


@over_formats
def test_zero_is_exact(format):
    for bits in [0, HALF, LARGEST_BITS]:
        codes = encode(format, [0.0, -0.0], bits)
        np.testing.assert_array_equal(decode(format, codes), 0)


@over_formats
def test_mean_of_all_roundings_is_the_number(format):
    draws = 2**12
    bits = (np.arange(draws, dtype=np.uint32) << 20) + np.uint32(1 << 19)
    x = probes(format)
    x = np.random.default_rng(1).permutation(x[x <= format.largest])[:256]
    codes = format.encode(np.broadcast_to(x[:, None], (256, draws)), bits)
    mean = np.mean(np.asarray(format.decode(codes), np.float64), axis=1)
    # Bits that fill their range evenly count up to half a draw too many or too few.
    offset = max(offset_of(format), 2.0**-126)
    step = (x + offset) / 2.0**format.mantissa_bits
    assert np.all(np.abs(mean - x) <= step / 2 / draws + 2.0**-23 * (x + offset))


@pytest.mark.parametrize("format", [UE6M2, UE8M8, SE5M2, SE8M7], ids=lambda f: f.name)
def test_mean_of_many_draws_is_the_number(format):
    draws = 100_000
    x = np.float32([[1e-9], [3e-4], [1.1], [1.9]])
    bits = rounding_bits((4, draws), step=3, leaf=1)
    codes = format.encode(np.broadcast_to(x, (4, draws)), bits)
    mean = np.mean(np.asarray(format.decode(codes), np.float64), axis=1)
    # Between two levels the standard deviation is at most half a step.
    half_step = (x[:, 0] + offset_of(format)) / 2.0**format.mantissa_bits / 2
    assert np.all(np.abs(mean - x[:, 0]) < 5 * half_step / math.sqrt(draws))


@st.composite
def formats(draw):
    signed = draw(st.booleans())
    bits = draw(st.sampled_from([8, 16])) - signed
    exponent_bits = draw(st.integers(max(1, bits - 15), min(8, bits)))
    mantissa_bits = bits - exponent_bits
    exponents = st.integers(mantissa_bits - 126, 127)
    return Minifloat(exponent_bits, mantissa_bits, draw(exponents), signed)


finite = st.floats(2.0**-126, 2.0**127, width=32) | st.just(0.0)
signed_finite = finite | finite.map(lambda x: -x)
any_bits = st.integers(0, 2**32 - 1).map(np.uint32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(formats(), st.lists(signed_finite, min_size=1, max_size=20), any_bits)
def test_rounding_moves_by_less_than_a_step_and_keeps_order(format, xs, bits):
    x = np.sort(np.resize(np.float32(xs), 20)).astype(np.float64)
    decoded = decode(format, encode(format, x, bits))
    assert np.all(np.diff(decoded) >= 0)
    target = np.clip(x, -format.largest if format.signed else 0, format.largest)
    # Adding and subtracting the offset rounds by half a unit each.
    step = 2.0**-format.mantissa_bits + 2.0**-23
    assert np.all(
        np.abs(decoded - target) <= step * (np.abs(target) + offset_of(format))
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(formats(), st.sampled_from([1.0, 0.9, 0.999, 1e-5]))
def test_name_tells_the_format(format, decay):
    format = dataclasses.replace(format, decay=decay)
    assert Minifloat.from_name(format.name) == format


def test_a_numpy_decay_has_the_name_of_a_python_one():
    decay = np.float64(0.99)
    assert dataclasses.replace(UE6M2, decay=decay).name == "UE6M2@-46*0.99"


def test_names_are_fixed():
    # Checkpoints contain them.
    assert UE6M2.name == "UE6M2@-46"
    assert UE8M8.name == "UE8M8@-127"
    assert SE5M2.name == "SE5M2@-28"
    assert SE8M7.name == "SE8M7@-127"
    assert dataclasses.replace(UE6M2, decay=0.999).name == "UE6M2@-46*0.999"


@pytest.mark.parametrize("eps", [1e-30, 1e-8, 1e-3, 0.01, 1.0, 3.0])
def test_window_from_eps(eps):
    inside = UE6M2.for_eps(eps)
    level = levels(inside, np.arange(256))
    # Relative to what the root sees, no step is larger than 1 / M ...
    assert np.all(np.diff(level) <= 0.25 * (1 + 1e-12) * (level[:-1] + eps))
    # ... which a window one octave higher would not grant.
    level = 2 * level
    assert np.any(np.diff(level) > 0.25 * (1 + 1e-12) * (level[:-1] + eps))
    outside = UE6M2.for_eps(eps, eps_in_sqrt=False)
    if eps**2 > 2.0**-120:
        assert eps**2 / 32 < 2.0**outside.lowest_exponent <= eps**2 / 16
    else:
        assert outside.lowest_exponent == -124


def test_levels_sink_with_the_decay():
    format = dataclasses.replace(UE6M2, decay=0.9)
    codes = jnp.arange(100, 250, dtype=jnp.uint8)
    value = UE6M2.decode(codes)
    np.testing.assert_array_equal(format.decode(codes, step=0), value)
    for step in range(1, 50):
        value = 0.9 * value
        codes = format.encode(value, HALF, step)
        # Fixed levels are up to 25 % apart. What remains here is the offset, which is
        # 2^-25 of the smallest value, and 50 roundings to float32.
        np.testing.assert_allclose(format.decode(codes, step), value, rtol=1e-5)
    ratio = format.decode(codes, step) / UE6M2.decode(codes)
    expected = 2.0 ** (-(step * -math.log2(0.9)) % 1 - 1)
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)


def test_levels_sink_exactly_after_many_steps():
    format = dataclasses.replace(UE8M8, decay=0.999)
    code = format.encode(1.0, HALF)
    step = 2_000_000_000
    octaves = (-math.log2(0.999) * step) % 1
    # 2^31 steps, each known to 2^-33 octaves.
    np.testing.assert_allclose(format.decode(code, step), 2**-octaves, rtol=0.2)
    now, later = (float(format.decode(code, s)) for s in (step, step + 1))
    np.testing.assert_allclose(later / now, 0.999, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 3, -46), "fill 8 or 16 bits, got 6 . 3 . 0 = 9"),
        ((6, 2, -46, True), "= 9"),
        ((9, 7, -46), "fill 8 or 16 bits"),
        ((8, 16, -46), "fill 8 or 16 bits"),
        ((6, 2, -125), r"lie in \[-124, 127\], got -125"),
        ((6, 2, 128), r"lie in \[-124, 127\], got 128"),
        ((6, 2, -46, False, 0.0), r"decay must be a number in \(0, 1\], got 0.0"),
        ((6, 2, -46, False, 1.1), r"got 1.1"),
    ],
)
def test_formats_that_do_not_exist_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Minifloat(*arguments)


@pytest.mark.parametrize("arguments", [(6.0, 2, -46), (6, "2", -46), (6, 2, -46.5)])
def test_bits_and_exponents_must_be_of_type_int(arguments):
    with pytest.raises(TypeError, match="must be of type int, got"):
        Minifloat(*arguments)


@pytest.mark.parametrize("name", ["UE6M2", "E6M2@-46", "UE6M2@-46*", "UE6M3@-46"])
def test_names_of_no_format_are_errors(name):
    with pytest.raises(ValueError, match=r"UE6M2@-46|fill 8"):
        Minifloat.from_name(name)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.inf, math.nan, "1e-8", None])
def test_eps_must_be_a_positive_number(eps):
    with pytest.raises(ValueError, match="eps must be a positive finite"):
        UE6M2.for_eps(eps)


def correlation(a, b):
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return np.corrcoef(a, b)[0, 1]


def assert_uncorrelated(a, b):
    # Of independent draws the correlation has a standard deviation of 1 / sqrt(n).
    assert abs(correlation(a, b)) < 5 / math.sqrt(np.size(a))


def test_bits_are_uniform():
    bits = np.asarray(rounding_bits((512, 1024), step=7, leaf=2))
    n = bits.size
    for shift in (0, 8, 16, 24):
        counts = np.bincount((bits.ravel() >> shift) & 0xFF, minlength=256)
        chi_squared = np.sum((counts - n / 256) ** 2) / (n / 256)
        # 255 degrees of freedom: mean 255, standard deviation sqrt(510).
        assert abs(chi_squared - 255) < 5 * math.sqrt(510)


def test_bits_of_neighbours_steps_and_leaves_are_independent():
    shape = (512, 512)
    bits = np.asarray(rounding_bits(shape, step=7, leaf=2))
    flat = bits.ravel()
    for lag in (1, 2, 3, 511, 512, 513, 4096):
        assert_uncorrelated(flat[:-lag], flat[lag:])
    for step, leaf in [(8, 2), (9, 2), (7, 3), (2, 7), (6, 3), (0, 0), (2**31, 2)]:
        other = np.asarray(rounding_bits(shape, step, leaf))
        assert_uncorrelated(bits, other)
        assert_uncorrelated(bits, other.T)
        for lag in (1, 2, 512):
            assert_uncorrelated(flat[:-lag], other.ravel()[lag:])
            assert_uncorrelated(flat[lag:], other.ravel()[:-lag])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 1)])
def test_bits_of_tiny_arrays_are_uniform_and_independent_in_time(shape):
    steps, leaves = 4096, 4

    def over_leaves(step):
        leaf = jnp.arange(leaves, dtype=jnp.uint32)
        return jax.vmap(lambda leaf: rounding_bits(shape, step, leaf))(leaf)

    bits = jax.vmap(over_leaves)(jnp.arange(steps, dtype=jnp.uint32))
    bits = np.asarray(bits).reshape(steps, leaves, -1)
    columns = bits.reshape(steps, -1).T
    for i, column in enumerate(columns):
        counts = np.bincount(column >> 28, minlength=16)
        chi_squared = np.sum((counts - steps / 16) ** 2) / (steps / 16)
        assert abs(chi_squared - 15) < 6 * math.sqrt(30)
        for lag in (1, 2, 3):
            assert_uncorrelated(column[:-lag], column[lag:])
        for other in columns[:i]:
            assert_uncorrelated(column, other)
            assert_uncorrelated(column[1:], other[:-1])


def hash_of(element, step, leaf):
    """The bits of one element, in Python integers."""

    def mix(x):  # Appleby's MurmurHash3, 32-bit finalizer
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    golden = 0x9E3779B1
    start = mix((mix((step + golden) % 2**32) + leaf) % 2**32)
    x = (start + element * golden) % 2**32
    x ^= x >> 15
    x = (x ^ mix((start + golden) % 2**32)) * 0x85EBCA77 % 2**32
    return x ^ x >> 15


def test_bits_never_change():
    # A resumed run depends on them.
    for step, leaf in [(0, 0), (1, 0), (0, 1), (123_456, 789), (2**32 - 1, 7)]:
        bits = rounding_bits((3, 2), np.uint32(step), leaf)
        expected = [hash_of(element, step, leaf) for element in range(6)]
        np.testing.assert_array_equal(bits.ravel(), np.uint32(expected))


def test_bits_belong_to_the_element_and_not_to_the_shape():
    flat = rounding_bits((24,), 5, 1)
    for shape in [(4, 6), (6, 4), (2, 3, 4), (1, 24, 1)]:
        np.testing.assert_array_equal(rounding_bits(shape, 5, 1).ravel(), flat)
    assert rounding_bits((0, 3), 5, 1).shape == (0, 3)


def test_no_step_repeats_another_one_shifted():
    # Two steps whose hashes begin at multiples of the stride from each other.
    steps = np.arange(2**22, dtype=np.uint32)
    start = np.asarray(jax.jit(lambda s: _mix(_mix(s + _GOLDEN)))(steps))
    inverse = pow(int(_GOLDEN), -1, 2**32)
    shift = (start - start[0]) * np.uint32(inverse)
    step = int(np.argmin(shift[1:])) + 1
    lag = int(shift[step])
    assert lag < 2**13
    first = np.asarray(rounding_bits((2**14,), 0, 0))
    second = np.asarray(rounding_bits((2**14,), step, 0))
    assert_uncorrelated(first[lag:], second[:-lag])
