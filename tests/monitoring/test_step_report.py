# SPDX-License-Identifier: Apache-2.0
"""The report against brute force in NumPy, figure by figure."""

import functools
import re
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers.comparison import assert_same_bits
from helpers.on_request import first_by_default
from helpers.trajectory import x64
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_rms
from optax_rms import step_report

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]
# A square, a division and a root round once each; the sum of squares, which carries its
# errors along, once more: at most 3 half units of the last place.
RMS_ERROR = 3 * 2.0**-24
# From the middle of a bin of 1/8 of an octave to its end.
BIN_ERROR = 1 / 16


def wide(x):
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def brute_force(g, u, p, nu=None, eps=None, in_sqrt=True, decay=None):
    """The figures of one leaf, element by element."""
    rows = list(zip(*(np.asarray(x).ravel() for x in (g, u, p)), strict=True))
    n = len(rows)

    def rms(column):
        return np.sqrt(np.mean(np.abs(wide([row[column] for row in rows])) ** 2))

    moved = [
        (np.float32(param) + np.float32(update)).astype(np.asarray(p).dtype)
        for _, update, param in rows
    ]
    nonzero = [update != 0 for _, update, _ in rows]
    lost = [
        bool(nz and m == row[2])
        for nz, m, row in zip(nonzero, moved, rows, strict=True)
    ]
    found = {
        "elements": n,
        "gradient_rms": rms(0),
        "update_rms": rms(1),
        "parameter_rms": rms(2),
        "update_to_parameter": rms(1) / rms(2) if rms(2) else None,
        "zero_gradients": sum(row[0] == 0 for row in rows) / n,
        "zero_updates": 1 - sum(nonzero) / n,
        "lost_to_rounding": sum(lost) / sum(nonzero) if any(nonzero) else None,
        "nonfinite": sum(not np.isfinite(wide(row)).all() for row in rows) / n,
    }
    if nu is not None:
        squares = np.asarray(nu, np.float32).ravel()
        live = [v != 0 or row[0] != 0 for v, row in zip(squares, rows, strict=True)]
        sizes = squares if in_sqrt else np.sqrt(squares)
        if eps is not None:
            small = [s < np.float32(eps) for s in sizes]
            ruled = sum(a and b for a, b in zip(live, small, strict=True))
            found["ruled_by_eps"] = ruled / sum(live) if any(live) else None
        if decay is not None:
            own = (1 - decay) * np.abs(wide([row[0] for row in rows])) ** 2
            at_cap = [
                o > 0 and o >= 0.75 * v for o, v in zip(own, squares, strict=True)
            ]
            found["at_cap"] = sum(at_cap) / sum(live) if any(live) else None
    return found


def assert_figures(figures, expected):
    for name, value in expected.items():
        actual = getattr(figures, name)
        if value is None:
            assert actual is None, name
        elif name.endswith("_rms"):
            assert actual == pytest.approx(value, rel=RMS_ERROR), name
        elif name == "update_to_parameter":
            assert actual == pytest.approx(value, rel=2 * RMS_ERROR), name
        else:
            assert actual == pytest.approx(value, rel=1e-15), name


def report_of(g, u, p, *state, jit=False, **options):
    function = functools.partial(step_report, **options)
    return (jax.jit(function) if jit else function)(g, u, p, *state)


def random_leaf(rng, shape, dtype):
    """Magnitudes over many octaves, zeros, and updates about the rounding of params."""

    def draw(low, high):
        sizes = np.exp2(rng.uniform(low, high, shape))
        signs = rng.choice([-1, 1, 1, 0], shape)
        return jnp.asarray((sizes * signs).astype(np.float32)).astype(dtype)

    return draw(-8, 8), draw(-14, -4), draw(-2, 2)


@pytest.mark.parametrize("jit", first_by_default([True, False]))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_shares_and_norms_are_those_of_brute_force(dtype, eps_in_sqrt, jit):
    rng = np.random.default_rng(0)
    g, u, p = random_leaf(rng, (16, 24), dtype)
    nu = jnp.asarray(np.exp2(rng.uniform(-8, 12, g.shape)), jnp.float32)
    nu = jnp.where(rng.random(g.shape) < 0.2, 0, nu)
    options = {"eps": 2.0, "decay": 0.5}
    report = report_of(
        *(g, u, p, optax.ScaleByRmsState(nu=nu)),
        jit=jit,
        eps_in_sqrt=eps_in_sqrt,
        **options,
    )
    expected = brute_force(g, u, p, nu, 2.0, eps_in_sqrt, 0.5)
    shares = ["ruled_by_eps", "at_cap", "zero_gradients"]
    if dtype == ml_dtypes.bfloat16:
        shares.append("lost_to_rounding")
    for name in shares:
        assert 0.05 < expected[name] < 0.95
    assert_figures(report.leaves["the only leaf"], expected)
    assert_figures(report.whole, expected)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 4)]),
)
def test_any_leaf(seed, dtype, shape):
    rng = np.random.default_rng(seed)
    g, u, p = random_leaf(rng, shape, dtype)
    nu = jnp.asarray(np.square(np.asarray(g, np.float32)) * rng.uniform(0, 2, shape))
    nu = nu.astype(jnp.float32)
    report = report_of(
        g, u, p, optax.ScaleByRmsState(nu=nu), jit=True, eps=0.5, decay=0.75
    )
    expected = brute_force(g, u, p, nu, 0.5, True, 0.75)
    # A product at the very limit may round to either side.
    own = 0.25 * np.square(np.asarray(g, np.float64))
    limit = 0.75 * np.asarray(nu, np.float64)
    if np.any((own > 0) & np.isclose(own, limit, rtol=1e-6)):
        del expected["at_cap"]
    assert_figures(report.whole, expected)


def all_pairs(dtype):
    """All positive numbers of 16 bits in steps, with updates around half a spacing."""
    info = ml_dtypes.finfo(dtype)
    top = int(np.asarray(info.max, dtype).view(np.uint16))
    params = np.arange(1, top, 7, dtype=np.uint16).view(dtype)
    following = (params.view(np.uint16) + 1).view(dtype)
    half = (following.astype(np.float64) - params.astype(np.float64)) / 2
    return params, half


@pytest.mark.parametrize("factor", first_by_default([-0.2, 0.75, 1.0, 1.25, -0.75], 2))
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_loss_to_rounding_of_every_kind_of_number(dtype, factor):
    """Also of subnormal float16, at ties, and where XLA computes in float32."""
    params, half = all_pairs(dtype)
    updates = (half * factor).astype(np.float32)
    kept = np.abs(updates) >= np.finfo(np.float32).tiny
    params, updates = params[kept], updates[kept]
    expected = np.mean((params.astype(np.float32) + updates).astype(dtype) == params)
    assert expected > 0.4 or expected < 0.1
    (p, u) = jnp.asarray(params), jnp.asarray(updates)
    for jit in (False, True):
        report = report_of(jnp.ones_like(p), u, p, jit=jit)
        assert report.whole.lost_to_rounding == pytest.approx(expected, rel=1e-15)


def test_update_in_the_dtype_of_the_parameter_is_lost_as_well():
    p = jnp.ones(4, jnp.bfloat16)
    u = jnp.asarray([2.0**-9, -(2.0**-9), 2.0**-7, 0.0], jnp.bfloat16)
    for jit in (False, True):
        figures = report_of(u, u, p, jit=jit).whole
        # Below 1 the spacing is half of that above: -2^-9 is a tie, and goes to even.
        assert figures.lost_to_rounding == 2 / 3
        assert optax.apply_updates(p, u).tolist() == [1, 1, 1 + 2.0**-7, 1]


def test_complex_leaves():
    g = jnp.asarray([3 + 4j, 0, 1j], jnp.complex64)
    p = jnp.asarray([1 + 1j, 1, 1e9j], jnp.complex64)
    u = jnp.asarray([1e-9 + 1e-9j, 1e-9 + 1j, 1], jnp.complex64)
    tx = optax.scale_by_rms(decay=0.75)
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(g, tx.init(p))
    figures = report_of(g, u, p, state, eps=1.0, decay=0.75).whole
    assert figures.gradient_rms == pytest.approx(np.sqrt(26 / 3), rel=RMS_ERROR)
    # The second moves its imaginary part, the third its real one, from 0 to 1.
    assert figures.lost_to_rounding == 1 / 3
    # Mean squares of 25/4 and 1/4; the second has had no gradient.
    assert figures.ruled_by_eps == 1 / 2


def test_float64_leaves():
    with x64():
        p = jnp.ones(8, jnp.float64)
        u = jnp.asarray([1e-17] * 3 + [1e-15] * 5)
        assert p.dtype == u.dtype == jnp.float64
        tx = optax_rms.scale_by_rms()
        _, state = tx.update(u, tx.init(p))
        figures = report_of(u, u, p, state, jit=True, eps=1e-8, decay=0.9).whole
    assert figures.lost_to_rounding == 3 / 8
    assert figures.ruled_by_eps == 1
    expected = np.sqrt((3 * 1e-34 + 5 * 1e-30) / 8)
    assert figures.update_rms == pytest.approx(expected, rel=RMS_ERROR)


def test_nonfinite_elements_are_counted_and_poison_only_their_own_norm():
    g = jnp.asarray([1.0, np.nan, np.inf, 2.0])
    u = jnp.asarray([1.0, 1.0, 1.0, np.nan])
    figures = report_of(g, u, jnp.ones(4)).whole
    assert figures.nonfinite == 3 / 4
    assert np.isnan(figures.gradient_rms)
    assert figures.parameter_rms == 1
    # An infinite parameter does not move either, but not because of rounding.
    u = jnp.asarray([1.0, np.inf, 1.0, 0.0])
    figures = report_of(jnp.ones(4), u, jnp.asarray([1.0, 1.0, np.inf, 1.0])).whole
    assert figures.nonfinite == 2 / 4
    assert figures.lost_to_rounding == 0
    overflow = report_of(jnp.full(3, 1e30), jnp.ones(3), jnp.ones(3)).whole
    assert overflow.gradient_rms == np.inf
    assert overflow.nonfinite == 0


def test_sum_of_millions_of_squares_is_not_worn_down():
    """One after the other in float32, these lose 2 %."""
    x = jnp.full(1 << 22, 0.1)
    figures = jax.jit(step_report)(x, x, x).whole
    assert figures.gradient_rms == pytest.approx(float(np.float32(0.1)), rel=RMS_ERROR)


def numpy_percentiles(ratios):
    return np.percentile(ratios, [1, 50, 99], method="inverted_cdf")


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 50, 99, 100, 101, 4096]),
    octaves=st.floats(0, 40),
)
def test_percentiles_are_those_of_numpy(seed, size, octaves):
    rng = np.random.default_rng(seed)
    g = rng.choice([-1, 1], size) * np.exp2(rng.uniform(-octaves, octaves, size))
    u = rng.choice([-1, 1, 0.5], size) * np.exp2(rng.uniform(-10, -5, size))
    g, u = g.astype(np.float32), u.astype(np.float32)
    report = step_report(jnp.asarray(g), jnp.asarray(u), jnp.ones(size))
    figures, expected = report.whole, numpy_percentiles(np.abs(u) / np.abs(g))
    actual = [figures.rate_p01, figures.rate_p50, figures.rate_p99]
    np.testing.assert_allclose(actual, expected, rtol=BIN_ERROR)


def test_percentiles_leave_out_zero_gradients_and_what_is_not_finite():
    g = jnp.asarray([0, 0, 0, 0, 1, 1, 2, np.nan, np.inf])
    u = jnp.asarray([1, 0, 0, 0, 4, 4, 8, 1, np.inf])
    report = step_report(g, u, jnp.ones(9))
    np.testing.assert_allclose(report.rates[-1], [4, 4, 4], rtol=BIN_ERROR)
    none = step_report(jnp.zeros(3), jnp.ones(3), jnp.ones(3))
    assert none.whole.rate_p50 is None
    still = step_report(jnp.ones(3), jnp.zeros(3), jnp.ones(3))
    assert still.whole.rate_p50 == 0


def test_percentiles_of_a_large_leaf_are_of_a_sample():
    """The median of 4,096 ranks: within 5 deviations of sqrt(1/4 / n)."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(300, 700)).astype(np.float32)
    u = np.full_like(g, 1e-3)
    figures = step_report(jnp.asarray(g), jnp.asarray(u), jnp.ones(g.shape)).whole
    ratios = np.abs(u) / np.abs(g)
    for share, value in ((0.01, figures.rate_p01), (0.5, figures.rate_p50)):
        slack = 5 * np.sqrt(share * (1 - share) / 3000)
        low = np.quantile(ratios, max(share - slack, 0)) * (1 - BIN_ERROR)
        high = np.quantile(ratios, share + slack) * (1 + BIN_ERROR)
        assert low <= value <= high


def test_sample_has_odd_and_even_columns():
    """Each head or channel of a power of two is in the sample."""
    g = jnp.tile(jnp.asarray([1.0, 8.0]), (512, 256))
    figures = step_report(g, jnp.ones(g.shape), jnp.ones(g.shape)).whole
    rates = [figures.rate_p01, figures.rate_p99]
    np.testing.assert_allclose(rates, [1 / 8, 1], rtol=BIN_ERROR)


def test_percentiles_of_all_leaves_weigh_a_sample_as_its_leaf():
    params = {"large": jnp.ones((600, 600)), "small": jnp.ones(4000)}
    updates = {"large": jnp.full((600, 600), 4.0), "small": jnp.full(4000, 1.0)}
    report = step_report(params, updates, params)
    # The small leaf is 1.1 % of all elements, and would be 52 % of the samples.
    np.testing.assert_allclose(report.rates[-1], [1, 4, 4], rtol=BIN_ERROR)


def take_steps(tx, params, gradients, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradients, state, params)
    return updates, state


PARAMS = {"a": jnp.ones((4, 6)), "b": jnp.full(5, 2.0)}
GRADIENTS = {
    "a": jnp.asarray(np.exp2(np.arange(-18, 6)).reshape(4, 6), jnp.float32),
    "b": jnp.asarray([0.0, 1e-3, 0.1, 1.0, 3.0]),
}
RMS = functools.partial(optax_rms.rmsprop, 0.01, 0.5, 1e-3)
WITHOUT_CORRECTION = {
    "this library": RMS(),
    "Optax": optax.rmsprop(0.01, 0.5, 1e-3),
    "momentum": RMS(momentum=0.9),
    "chain": optax.chain(optax.clip(1e9), RMS()),
    "partition": optax.partition({"x": RMS(), "y": RMS()}, {"a": "x", "b": "y"}),
    "masked": optax.masked(RMS(), {"a": True, "b": True}),
    "inject": optax.inject_hyperparams(optax_rms.rmsprop)(0.01, 0.5, 1e-3),
    "MultiSteps": optax.MultiSteps(RMS(), 1).gradient_transformation(),
    "torch": optax_rms.dialects.torch.rmsprop(0.01, 0.5, 1e-3),
    "keras": optax_rms.dialects.keras.rmsprop(0.01, 0.5, epsilon=1e-3),
    "finite": optax.apply_if_finite(RMS(), 3),
}
WITH_CORRECTION = {
    "this library": RMS(bias_correction=True),
    "Optax": optax.rmsprop(0.01, 0.5, 1e-3, bias_correction=True),
    "Adam": optax.adam(0.01, b2=0.5, eps=1e-3),
}


@pytest.mark.parametrize("name", first_by_default(WITHOUT_CORRECTION, 5))
def test_mean_square_is_found_in_the_state(name):
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by an integer.
        updates, state = take_steps(WITHOUT_CORRECTION[name], PARAMS, GRADIENTS)
    report = step_report(GRADIENTS, updates, PARAMS, state, eps=1e-3, decay=0.5)
    for leaf, g in GRADIENTS.items():
        nu = np.square(g) * (1 - 0.5**3)
        expected = brute_force(g, updates[leaf], PARAMS[leaf], nu, 1e-3, True, 0.5)
        assert 0.2 < expected["ruled_by_eps"] < 0.9
        assert_figures(report.leaves[leaf], expected)
        # Of a constant gradient, 7/8 after three steps at a decay of 1/2.
        ratio = report.leaves[leaf].gradient_to_mean_square
        assert ratio == pytest.approx(8 / 7, rel=8 * RMS_ERROR)


@pytest.mark.parametrize("name", WITH_CORRECTION)
def test_corrected_mean_square_is_meant(name):
    with jax.numpy_dtype_promotion("standard"):
        updates, state = take_steps(WITH_CORRECTION[name], PARAMS, GRADIENTS)
    # The corrected mean square of a constant gradient is the square itself, and between
    # it and 7/8 of it lies this eps.
    eps = 0.95 * 2.0**-10
    report = step_report(GRADIENTS, updates, PARAMS, state, eps=eps, decay=0.5)
    for leaf, g in GRADIENTS.items():
        expected = brute_force(g, updates[leaf], PARAMS[leaf], np.square(g), eps)
        assert_figures(report.leaves[leaf], expected)
    without = np.mean(np.square(GRADIENTS["a"]) * (7 / 8) < eps)
    assert report.leaves["a"].ruled_by_eps != without
    unknown = step_report(GRADIENTS, updates, PARAMS, state, eps=eps)
    assert unknown.whole.ruled_by_eps is None
    assert unknown.whole.gradient_to_mean_square is None


def test_correction_of_a_long_average_is_precise():
    """The difference of 1 and a power of decay in float32 would be 1e-4 off."""
    decay = 1 - 2.0**-14
    total = 1 - decay**3
    nu = jnp.full(4, total, jnp.float32)
    state = optax.ScaleByAdamState(count=jnp.asarray(3), mu=nu, nu=nu)
    figures = report_of(*(jnp.ones(4),) * 3, state, decay=decay).whole
    # The logarithm, the exponential and the quotient, each to 2 half units.
    assert figures.gradient_to_mean_square == pytest.approx(1, rel=6 * 2.0**-24)


def test_leaves_without_mean_square_are_no_part_of_a_spike():
    labels = {"a": "rms", "b": "sgd"}
    tx = optax.partition({"rms": RMS(), "sgd": optax.sgd(0.1)}, labels)
    updates, state = take_steps(tx, PARAMS, GRADIENTS)
    report = step_report(GRADIENTS, updates, PARAMS, state)
    assert report.leaves["b"].gradient_to_mean_square is None
    spike = report.leaves["a"].gradient_to_mean_square
    assert report.whole.gradient_to_mean_square == spike


def test_eps_outside_the_root_is_compared_with_the_root():
    tx = optax_rms.scale_by_rms(0.5, 0.1, eps_in_sqrt=False)
    updates, state = take_steps(tx, PARAMS, GRADIENTS, 1)
    report = step_report(GRADIENTS, updates, PARAMS, state, eps=0.1, eps_in_sqrt=False)
    expected = np.mean(np.asarray(GRADIENTS["a"]) * np.sqrt(0.5) < 0.1)
    assert report.leaves["a"].ruled_by_eps == pytest.approx(expected)
    assert expected != np.mean(np.square(GRADIENTS["a"]) * 0.5 < 0.1)


@pytest.mark.parametrize(
    "tx",
    [
        optax_rms.scale_by_rms(0.75, centered=True),
        optax_rms.scale_by_rms(0.75, centered=True, bias_correction=True),
        optax.scale_by_stddev(0.75),
        optax.scale_by_stddev(0.75, bias_correction=True),
    ],
    ids=["ours", "ours, corrected", "Optax", "Optax, corrected"],
)
def test_noise_to_signal_and_variance_of_a_centered_state(tx):
    rng = np.random.default_rng(1)
    stream = rng.normal(1, 0.5, (6, 40)).astype(np.float32)
    state = tx.init(jnp.zeros(40))
    with jax.numpy_dtype_promotion("standard"):
        for g in stream:
            updates, state = tx.update(jnp.asarray(g), state)
    weights = 0.25 * 0.75 ** np.arange(5, -1, -1)[:, None]
    if getattr(state, "count", None) is not None and "count" in state._fields:
        weights = weights / weights.sum()
    mean = (weights * stream).sum(0)
    variance = (weights * np.square(stream, dtype=np.float64)).sum(0) - mean**2
    report = step_report(
        jnp.asarray(stream[-1]), updates, jnp.ones(40), state, eps=0.2, decay=0.75
    )
    noise = np.sqrt(variance.mean() / np.square(mean).mean())
    # Optax takes the difference of squares of about 1 and 1.25 in float32, six times.
    assert report.whole.noise_to_signal == pytest.approx(noise, rel=1e-5)
    assert not np.any(np.isclose(variance, 0.2, rtol=1e-4))
    assert report.whole.ruled_by_eps == pytest.approx(np.mean(variance < 0.2))
    # Of this gradient, 3/4 of the variance, and not of the mean square.
    own = 0.25 * np.square(stream[-1], dtype=np.float64)
    assert not np.any(np.isclose(own, 0.75 * variance, rtol=1e-4))
    assert report.whole.at_cap == pytest.approx(np.mean(own >= 0.75 * variance))
    assert report.whole.at_cap > np.mean(own >= 0.75 * (variance + mean**2))
    mean_square = (variance + mean**2).mean()
    spike = np.square(stream[-1], dtype=np.float64).mean() / mean_square
    assert report.whole.gradient_to_mean_square == pytest.approx(spike, rel=1e-5)


def test_cap_is_where_the_mean_square_was_just_born():
    tx = optax_rms.scale_by_rms(0.9, 0.0)
    params = jnp.ones(4)
    old = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    _, state = take_steps(tx, params, old, 50)
    g = jnp.asarray([1.0, 100.0, 1e-3, 0.0])
    updates, state = tx.update(g, state)
    np.testing.assert_allclose(
        np.abs(updates) * np.sqrt(0.1), [np.sqrt(0.1), 1, 1, 0], rtol=1e-2
    )
    figures = step_report(g, updates, params, state, decay=0.9).whole
    # The last has had no gradient and does not count.
    assert figures.at_cap == 2 / 3
    assert figures.gradient_to_mean_square == pytest.approx(9.99, rel=1e-2)


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.lion(0.1),
        optax.sm3(0.1),
        optax.adagrad(0.1),
        optax.flatten(optax_rms.rmsprop(0.1)),
        optax.chain(optax_rms.scale_by_rms(), optax_rms.scale_by_rms()),
    ],
    ids=["sgd", "lion", "sm3", "adagrad", "flat", "two mean squares"],
)
def test_what_the_state_does_not_tell_is_none(tx):
    with jax.numpy_dtype_promotion("standard"):
        updates, state = take_steps(tx, PARAMS, GRADIENTS)
    report = step_report(GRADIENTS, updates, PARAMS, state, eps=0.1, decay=0.9)
    for figures in (report.whole, *report.leaves.values()):
        for name in (
            "ruled_by_eps",
            "at_cap",
            "gradient_to_mean_square",
            "noise_to_signal",
            "saturated_codes",
        ):
            assert getattr(figures, name) is None
        assert figures.update_rms > 0
        assert figures.rate_p50 > 0


def test_without_state_eps_and_decay_there_is_the_rest():
    updates, state = take_steps(RMS(), PARAMS, GRADIENTS)
    bare = step_report(GRADIENTS, updates, PARAMS)
    assert bare.whole.state_bytes is None
    assert bare.whole.update_to_parameter is not None
    told = step_report(GRADIENTS, updates, PARAMS, state)
    assert told.whole.ruled_by_eps is None
    assert told.whole.at_cap is None
    assert told.whole.gradient_to_mean_square is not None


def test_codes_are_decoded_counted_and_weighed():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones(16)}
    gradients = {"a": jnp.full((8, 8), 1e4), "b": jnp.full(16, 0.5)}
    gradients["a"] = gradients["a"].at[:2].set(1e-3)
    inner = optax_rms.rmsprop(1e-2, 0.5, 1e-3, momentum=0.9)
    tx = optax_rms.compress_state(inner, nu=optax_rms.UE6M2, trace=optax_rms.SE5M2)
    updates, state = tx.update(gradients, tx.init(params), params)
    report = step_report(gradients, updates, params, state, eps=1e-3, decay=0.5)
    counts = optax_rms.count_extremes(state)
    assert counts["nu"].saturated == 48
    assert counts["trace"].saturated == 0
    assert report.leaves["a"].saturated_codes == 48 / 128
    assert report.leaves["b"].saturated_codes == 0
    assert report.whole.saturated_codes == 48 / (2 * 80)
    assert report.leaves["a"].ruled_by_eps == 1 / 4
    assert report.leaves["b"].ruled_by_eps == 0
    # Where the code is saturated, the mean square is too small, and the cap exceeded.
    assert report.leaves["b"].at_cap == 1
    assert report.leaves["a"].state_bytes == 2 * 64
    # With the counters.
    assert report.whole.state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))


def test_new_mean_squares_are_at_the_cap_whatever_their_codes_round_to():
    gradients = jnp.asarray(np.exp2(np.random.default_rng(0).uniform(-6, 6, 4000)))
    gradients = gradients.astype(jnp.float32)
    tx = optax_rms.compress_state(optax_rms.scale_by_rms(0.9), nu=optax_rms.UE6M2)
    updates, state = tx.update(gradients, tx.init(gradients))
    figures = step_report(gradients, updates, gradients, state, decay=0.9).whole
    assert figures.at_cap == 1


def test_split_weights_lose_nothing():
    params = {"w": jnp.ones(64, jnp.bfloat16)}
    gradients = {"w": jnp.ones(64, jnp.bfloat16)}
    plain = optax_rms.rmsprop(1e-3, 0.0)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = plain.update(gradients, plain.init(params), params)
        lost = step_report(gradients, updates, params, state).whole.lost_to_rounding
        split = optax_rms.split_master_weights(plain)
        kept, state = split.update(gradients, split.init(params), params)
    assert lost == 1
    report = step_report(gradients, kept, params, state, eps=2.0, decay=0.0)
    assert report.whole.lost_to_rounding in (0, None)
    assert report.whole.ruled_by_eps == 1
    # A residual of one byte and a mean square of four each.
    assert report.leaves["w"].state_bytes == 64 * 5
    assert report.whole.state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.slow
def test_each_layer_of_a_stacked_leaf_has_a_row_of_its_own():
    rng = np.random.default_rng(3)
    layers = [random_leaf(rng, (5, 7), jnp.float32) for _ in range(3)]
    tx = optax_rms.scale_by_rms(0.5, 1e-2)
    options = {"eps": 1e-2, "decay": 0.5}
    for axis in (0, 1, -1):
        g, u, p = (jnp.stack(xs, axis) for xs in zip(*layers, strict=True))
        trees = [{"blocks": {"w": x}, "head": x} for x in (g, u, p)]
        _, state = tx.update(trees[0], tx.init(trees[0]))
        report = report_of(
            *trees,
            state,
            **options,
            jit=True,
            layer_axis={"blocks": axis, "head": None},
        )
        assert list(report.leaves) == [*(f"blocks.w[{i}]" for i in range(3)), "head"]
        for i, layer in enumerate(layers):
            _, alone = tx.update(layer[0], tx.init(layer[0]))
            expected = step_report(*layer, alone, **options).whole
            # Without the bytes, of which each layer has a third.
            chex.assert_trees_all_equal(
                report.leaves[f"blocks.w[{i}]"]._replace(state_bytes=None),
                expected._replace(state_bytes=None),
            )
        assert report.leaves["blocks.w[1]"].state_bytes == 4 * 35
        all_stacked = step_report(*trees, state, layer_axis=axis)
        assert len(all_stacked.leaves) == 6


def test_whole_is_the_report_on_one_leaf_of_all_elements():
    rng = np.random.default_rng(4)
    leaves = {"x": random_leaf(rng, (30,), jnp.float32)}
    leaves["y"] = random_leaf(rng, (11, 3), jnp.float32)
    trees = [{name: leaf[i] for name, leaf in leaves.items()} for i in range(3)]
    joined = [jnp.concatenate([t["x"], t["y"].ravel()]) for t in trees]
    tx = optax_rms.scale_by_rms(0.5, 1e-2, centered=True)
    options = {"eps": 1e-2, "decay": 0.5}
    reports = []
    for g, u, p in (trees, joined):
        _, state = tx.update(g, tx.init(g))
        reports.append(step_report(g, u, p, state, **options).whole)
    for name, a, b in zip(reports[0]._fields, *reports, strict=True):
        # Approximations of None are not defined.
        assert a == b if b is None else a == pytest.approx(b, rel=4 * RMS_ERROR), name


def test_scan_and_vmap_carry_reports():
    tx = RMS()
    options = {"eps": 1e-3, "decay": 0.5}

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        report = step_report(g, updates, params, state, **options)
        return (optax.apply_updates(params, updates), state), report

    stream = jax.tree.map(lambda g: jnp.stack([g, 3 * g]), GRADIENTS)
    carry, stacked = jax.jit(functools.partial(jax.lax.scan, step))(
        (PARAMS, tx.init(PARAMS)), stream
    )
    carry = PARAMS, tx.init(PARAMS)
    for t in range(2):
        carry, alone = step(carry, jax.tree.map(lambda x, t=t: x[t], stream))
        assert_close_reports(jax.tree.map(lambda x, t=t: x[t], stacked), alone)

    def first(g):
        updates, state = tx.update(g, tx.init(PARAMS), PARAMS)
        return step_report(g, updates, PARAMS, state, **options)

    together = jax.vmap(first)(stream)
    for i in range(2):
        alone = first(jax.tree.map(lambda x, i=i: x[i], stream))
        assert_close_reports(jax.tree.map(lambda x, i=i: x[i], together), alone)


def assert_close_reports(actual, expected):
    """Equal counts, norms but for a rounding, and rates in the same bin or the next."""
    tolerances = {"rates": 2 * BIN_ERROR}
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        tolerance = tolerances.get(name, 4 * RMS_ERROR)
        chex.assert_trees_all_close(a, e, rtol=tolerance, atol=0)


def test_sharded_report_has_the_same_counts_and_gathers_nothing():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    rng = np.random.default_rng(5)
    trees = [{"w": x} for x in random_leaf(rng, (256, 128), jnp.float32)]
    nu = jnp.square(trees[0]["w"])
    state = optax.ScaleByRmsState(nu={"w": nu})
    function = jax.jit(functools.partial(step_report, eps=0.1, decay=0.5))
    expected = function(*trees, state)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    arguments = jax.device_put((*trees, state), spec)
    actual = function(*arguments)
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        if name.endswith("_rms") or name == "second_moment":
            np.testing.assert_allclose(a, e, rtol=2 * RMS_ERROR, err_msg=name)
        else:
            assert_same_bits(a, e)
    program = function.lower(*arguments).compile().as_text()
    assert "all-reduce" in program
    moved = re.findall(
        r"= \S*?\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", program
    )
    # The sample, at most, and not the leaf of 32,768 elements.
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in moved]
    assert max(sizes, default=0) <= 4096


def test_leaves_without_gradient_and_empty_trees():
    params = {"w": jnp.ones(3), "n": jnp.asarray(3), "frozen": jnp.ones(2)}
    gradients = {"w": jnp.ones(3), "n": None, "frozen": None}
    report = step_report(gradients, gradients, params)
    assert list(report.leaves) == ["w"]
    masked = {"w": jnp.ones(3), "frozen": optax.MaskedNode()}
    assert list(step_report(masked, masked, masked).leaves) == ["w"]
    empty = step_report({}, {}, {})
    assert empty.leaves == {}
    assert empty.whole.elements == 0
    assert empty.whole.gradient_rms is None
    assert empty.to_dict() == {"elements": 0.0}
    nothing = step_report(jnp.ones((0, 3)), jnp.ones((0, 3)), jnp.ones((0, 3)))
    assert nothing.whole.gradient_rms is None


def test_numbers_are_python_numbers_with_the_prefix():
    updates, state = take_steps(RMS(), PARAMS, GRADIENTS)
    report = step_report(GRADIENTS, updates, PARAMS, state, eps=1e-3)
    found = report.to_dict("optimizer/")
    assert {type(v) for v in found.values()} == {float}
    assert found["optimizer/a/ruled_by_eps"] == report.leaves["a"].ruled_by_eps
    assert found["optimizer/update_rms"] == report.whole.update_rms
    assert not any("at_cap" in name for name in found)


def test_names_are_unique_where_keys_have_dots():
    tree = {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}
    names = list(step_report(tree, tree, tree).leaves)
    assert names == ["['a']['b']", "['a.b']"]


def test_exact_share_is_the_quotient_of_integers():
    g = jnp.zeros(7).at[0].set(1.0)
    share = step_report(g, g, g).whole.zero_gradients
    assert share == float(Fraction(6, 7))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((jnp.arange(3),) * 3, {}, TypeError, "gradients must be floating-point"),
        (({"w": jnp.ones(3)}, {}, {}), {}, ValueError, "updates must be a tree like"),
        (
            ({"w": jnp.ones(3)}, {"w": jnp.ones(2)}, {"w": jnp.ones(3)}),
            {},
            ValueError,
            r"\['w'\]: gradient \(3,\), update \(2,\), parameter \(3,\)",
        ),
        ((jnp.ones(3),) * 3, {"eps": -1.0}, ValueError, "eps must be a finite number"),
        ((jnp.ones(3),) * 3, {"decay": 1.5}, ValueError, "decay must be a finite"),
        ((jnp.ones(3),) * 3, {"eps_in_sqrt": 1}, TypeError, "eps_in_sqrt must be True"),
        ((jnp.ones(3),) * 3, {"layer_axis": 1}, ValueError, r"shape \(3,\), axis 1"),
        ((jnp.ones(3),) * 3, {"layer_axis": "x"}, TypeError, "axes of type int"),
        ((jnp.ones(3),) * 3, {"layer_axis": {"w": 0}}, ValueError, "a tree prefix of"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        step_report(*arguments, **options)
