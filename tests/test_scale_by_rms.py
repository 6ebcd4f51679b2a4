# SPDX-License-Identifier: Apache-2.0
"""The transformation against Optax, against the float64 reference, and at its edges."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import assert_same_bits
from helpers.on_request import first_by_default
from helpers.reference import gradient_stream, relative_error
from helpers.reference import rmsprop as reference_rmsprop
from helpers.running import run
from helpers.trajectory import (
    alternating_stream,
    rounding_bound,
    three_dtypes,
    x64,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import optax_rms
from optax_rms import scale_by_rms

STEPS = 12
BOTH = [False, True]
VARIANTS = [
    {"eps_in_sqrt": eps_in_sqrt, "centered": centered, "bias_correction": correction}
    for eps_in_sqrt in BOTH
    for centered in BOTH
    for correction in BOTH
]
# Four of the eight have every pair of values of two flags.
VARIANTS.sort(key=lambda variant: sum(variant.values()) % 2)
EPS32 = float(jnp.finfo(jnp.float32).eps)


def variant_id(variant):
    return "-".join(name for name, on in variant.items() if on) or "none"


every_variant = pytest.mark.parametrize(
    "variant", first_by_default(VARIANTS, 4), ids=variant_id
)
uncentered = pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if not v["centered"]], ids=variant_id
)


def stream_for(variant, *args):
    return (alternating_stream if variant["centered"] else gradient_stream)(*args)


def optax_twin(decay=0.9, *, centered=False, **options):
    twin = optax.scale_by_stddev if centered else optax.scale_by_rms
    return twin(decay, **options)


@pytest.mark.parametrize("twin", [optax.scale_by_rms, optax.scale_by_stddev])
def test_positional_arguments_are_those_of_optax(twin):
    ours = list(inspect.signature(scale_by_rms).parameters.values())
    theirs = list(inspect.signature(twin).parameters.values())
    shared = [(p.name, p.kind, p.default) for p in ours[: len(theirs)]]
    assert shared == [(p.name, p.kind, p.default) for p in theirs]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("initial_scale", [0.0, 1.0])
@every_variant
@x64()
def test_trajectory_is_that_of_optax(variant, initial_scale):
    gradients = three_dtypes(stream_for(variant, STEPS))
    options = {**variant, "initial_scale": initial_scale}
    ours = run(scale_by_rms(**options), gradients).path
    # Optax's bias correction needs the standard promotion.
    with jax.numpy_dtype_promotion("standard"):
        theirs = run(optax_twin(**options), gradients).path
    for name, g in gradients.items():
        bound = rounding_bound(g.dtype, STEPS)
        assert relative_error(ours[name], theirs[name]) < bound, name


@pytest.mark.parametrize("bias_correction", BOTH)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_uncentered_optax_state_continues(bias_correction, dtype):
    g = jnp.asarray(gradient_stream(STEPS), dtype)
    theirs = optax.scale_by_rms(bias_correction=bias_correction)
    ours = scale_by_rms(bias_correction=bias_correction)
    state = theirs.init(g[0])
    chex.assert_trees_all_equal_structs(state, ours.init(g[0]))
    for t in range(STEPS):
        with jax.numpy_dtype_promotion("standard"):
            expected, next_state = theirs.update(g[t], state)
        update, our_next_state = ours.update(g[t], state)
        nu = optax.tree.get(next_state, "nu")
        our_nu = optax.tree.get(our_next_state, "nu")
        assert our_nu.dtype == nu.dtype
        bound = rounding_bound(jnp.float32, 1)
        np.testing.assert_allclose(our_nu, nu, rtol=bound)
        np.testing.assert_allclose(update, expected, rtol=bound)
        state = next_state


@uncentered
@given(
    decay=st.sampled_from([0.0, 1e-30, 0.9, 0.999, 1 - 1e-6])
    | st.floats(0.0, 1.0, exclude_max=True, allow_subnormal=False),
    eps=st.sampled_from([0.0, 1e-8, 1.0]) | st.floats(1e-16, 1e3),
    initial_scale=st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1e3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
@x64()
def test_formula_for_all_hyperparameters(variant, decay, eps, initial_scale, seed):
    options = {**variant, "decay": decay, "eps": eps, "initial_scale": initial_scale}
    g = gradient_stream(STEPS, eps or 1e-8, seed).astype(np.float64)
    u = run(scale_by_rms(**options), g).path
    # The update is minus the reference's step at learning rate 1.
    expected = -reference_rmsprop(g, 1.0, **options)
    # The reference's 1 - decay^t loses digits where decay is near 1.
    loss = 1 / (1 - decay) if variant["bias_correction"] else 1
    assert relative_error(u, expected) < loss * rounding_bound(np.float64, STEPS)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1 - 1e-5, 1 - 2**-22])
@pytest.mark.parametrize("traced", BOTH)
def test_first_bias_corrected_update_is_the_sign(decay, traced):
    """However near to 1 the decay is: the weight of one gradient cancels exactly."""
    g = jnp.array([-3.0, 1e-6])

    def first(decay):
        tx = scale_by_rms(decay, 0.0, bias_correction=True)
        update, _ = tx.update(g, tx.init(g))
        return update

    update = jax.jit(first)(decay) if traced else first(decay)
    np.testing.assert_allclose(update, [-1.0, 1.0], rtol=rounding_bound(np.float32, 1))


def test_decay_of_one_never_forgets_the_initial_scale():
    tx = scale_by_rms(decay=1.0, eps=0.0, initial_scale=4.0)
    np.testing.assert_array_equal(run(tx, jnp.array([3.0, 8.0])).updates, [1.5, 4.0])


def weighted_deviation(gradients, decay, bias_correction):
    """The standard deviation by its definition in float64: two passes, no subtraction.

    Without bias correction the average starts from a zero of weight decay^steps.
    """
    g = np.asarray(gradients, np.float64)
    ages = np.arange(len(g))[::-1, None]
    weights = -np.expm1(np.log(decay)) * decay ** ages.astype(np.float64)
    if bias_correction:
        weights = weights / weights.sum()
        rest = 0.0
    else:
        rest = decay ** len(g)
    mean = (weights * g).sum(axis=0)
    return np.sqrt((weights * (g - mean) ** 2).sum(axis=0) + rest * mean**2)


@pytest.mark.parametrize(
    "decay",
    first_by_default(
        [1e-30, 1e-8, 1e-3, 0.5, 0.999, 1e-16, 1e-6, 0.1, 0.9, 0.99, 1 - 1e-5], 5
    ),
)
@pytest.mark.parametrize("bias_correction", first_by_default([True, False]))
def test_deviation_of_noise_on_a_large_offset(decay, bias_correction):
    """Where E[g^2] - E[g]^2 has no digit left, the deviation is good to a few ulp of g.

    The deviation is a norm of the distances from the mean, so that their rounding
    errors, a few ulp, change it by no more than that. The distance from the new mean
    is weighted by 1 / decay, until it is rounding alone and left out.
    """
    rng = np.random.default_rng(0)
    offset, spread = np.repeat([0.0, 1000.0], 4), np.tile([1e-3, 1e-2, 0.1, 1.0], 2)
    noise = rng.normal(size=(300, 8))
    g = (offset + spread * noise).astype(np.float32)
    tx = scale_by_rms(decay, centered=True, bias_correction=bias_correction)
    state, steps_to_look_at = tx.init(g[0]), {1, 2, 3, 30, len(g)}
    bound = 8 * EPS32 * np.abs(g).max(axis=0) / np.sqrt(max(decay, EPS32))
    for t in range(1, len(g) + 1):
        update, state = tx.update(g[t - 1], state)
        assert np.isfinite(update).all()
        assert (state.variance >= 0).all()
        if t in steps_to_look_at:
            total = -np.expm1(t * np.log(decay)) if bias_correction else 1.0
            deviation = np.sqrt(np.asarray(state.variance, np.float64) / total)
            expected = weighted_deviation(g[:t], decay, bias_correction)
            assert (np.abs(deviation - expected) < bound).all()


@pytest.mark.parametrize("decay", first_by_default([0.9, 0.99]))
@pytest.mark.parametrize("bias_correction", BOTH)
def test_constant_gradients_never_break_the_variance(decay, bias_correction):
    """The worst error over all steps is no larger than Optax's, for every parameter."""
    g = jnp.linspace(0.1, 1000.0, 1000)
    wide = np.asarray(g, np.float64)
    steps, eps = 5000, 1e-8
    options = {"decay": decay, "eps": eps, "bias_correction": bias_correction}

    def worst_error(tx):
        update = jax.jit(tx.update)
        state, worst, variances = tx.init(g), np.zeros_like(wide), []
        for t in range(1, steps + 1):
            u, state = update(g, state)
            variance = (1 - decay**t) * decay**t * wide**2
            exact = wide / np.sqrt(eps + (0 if bias_correction else variance))
            error = np.abs(np.asarray(u, np.float64) - exact) / exact
            worst = np.maximum(worst, np.where(np.isnan(u), np.inf, error))
            variances.append(optax.tree.get(state, "variance", 0.0))
        assert np.min(variances) >= 0
        return worst

    ours = worst_error(scale_by_rms(**options, centered=True))
    with jax.numpy_dtype_promotion("standard"):
        theirs = worst_error(optax.scale_by_stddev(**options))
    assert np.isinf(theirs).any()
    assert np.isfinite(ours).all()
    assert (ours <= theirs).all()


@every_variant
@given(
    g=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=6),
    eps=st.sampled_from([0.0, 1e-8, 1.0]),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_updates_are_finite_and_keep_the_sign(variant, g, eps):
    """For whatever finite gradients, squares that underflow included.

    From an average that starts at 0, no root is smaller than sqrt(1 - decay) |g|, which
    bounds the update; the distance from a mean is not bounded from below.
    """
    g = np.array(g, np.float32)[:, None]
    u = run(scale_by_rms(0.9, eps, **variant), g).updates
    assert np.isfinite(u).all()
    assert (u * np.sign(g) >= 0).all()
    if not variant["centered"]:
        assert (np.abs(u) <= (1 + 8 * EPS32) / np.sqrt(1 - 0.9)).all()


@every_variant
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_float32_rounded_once(variant, dtype):
    g = jnp.asarray(stream_for(variant, STEPS), dtype)
    tx = scale_by_rms(**variant)
    half, single = tx.init(g[0]), tx.init(g[0].astype(jnp.float32))
    for t in range(STEPS):
        update, half = tx.update(g[t], half)
        expected, single = tx.update(g[t].astype(jnp.float32), single)
        assert_same_bits(update, expected.astype(dtype))
        assert_same_bits(half, single)


def test_the_update_has_the_dtype_of_the_gradient_not_of_the_parameter():
    tx = scale_by_rms()
    update, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2, jnp.bfloat16)))
    assert update.dtype == state.nu.dtype == jnp.float32


@pytest.mark.parametrize(
    ("param", "given_dtype", "nu", "mu"),
    [
        ("bfloat16", None, "float32", "float32"),
        ("float32", None, "float32", "float32"),
        ("float64", None, "float64", "float64"),
        ("complex64", None, "float32", "complex64"),
        ("complex128", None, "float64", "complex128"),
        ("float32", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float64", "float64", "float64"),
        ("float64", "float32", "float32", "float32"),
        ("complex64", "bfloat16", "bfloat16", "complex64"),
        ("complex64", "float64", "float64", "complex128"),
    ],
)
@x64()
def test_accumulator_dtype(param, given_dtype, nu, mu):
    p = jnp.ones(2, param)
    for centered in BOTH:
        tx = scale_by_rms(centered=centered, accumulator_dtype=given_dtype)
        before = tx.init(p)
        update, after = tx.update(p, before)
        assert update.dtype == param
        for state in (before, after):
            if centered:
                assert (state.mu.dtype, state.variance.dtype) == (mu, nu)
            else:
                assert state.nu.dtype == nu


@every_variant
def test_stored_narrow_but_computed_in_float32(variant):
    """A step from a bfloat16 average is the float32 step from the same numbers."""
    g = jnp.asarray(stream_for(variant, STEPS), jnp.bfloat16)
    narrow = scale_by_rms(**variant, accumulator_dtype=jnp.bfloat16)
    wide = scale_by_rms(**variant)
    state, wide_state = narrow.init(g[0]), wide.init(g[0])
    for t in range(STEPS):
        widened = optax.tree.cast_like(state, wide_state)
        expected, wide_state = wide.update(g[t].astype(jnp.float32), widened)
        update, state = narrow.update(g[t], state)
        assert_same_bits(update, expected.astype(jnp.bfloat16))
        assert_same_bits(state, optax.tree.cast_like(wide_state, state))


@every_variant
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zero_gradients_give_zero_updates(variant, eps):
    g = jnp.array([[0.0, 0.0], [0.0, 2.0], [0.0, -1.0]])
    u = run(scale_by_rms(eps=eps, **variant), g).updates
    np.testing.assert_array_equal(u[:, 0], 0.0)
    np.testing.assert_array_equal(u[0], 0.0)
    assert np.isfinite(u).all()


@every_variant
def test_nan_spoils_its_coordinate_only_and_for_good(variant):
    clean = stream_for(variant, STEPS)
    spoilt = clean.copy()
    spoilt[4, 1] = np.nan
    u = run(scale_by_rms(**variant), spoilt).updates
    expected = run(scale_by_rms(**variant), clean).updates
    expected[4:, 1] = np.nan
    np.testing.assert_array_equal(u, expected)


@every_variant
@pytest.mark.parametrize("value", [np.inf, -np.inf, 3e38])
def test_infinity_spoils_its_coordinate_as_in_optax(variant, value):
    clean = stream_for(variant, STEPS)
    spoilt = clean.copy()
    spoilt[4, 1] = value
    u = run(scale_by_rms(**variant), spoilt).updates
    expected = run(scale_by_rms(**variant), clean).updates
    np.testing.assert_array_equal(np.delete(u, 1, 1), np.delete(expected, 1, 1))
    if variant["centered"]:
        # Optax has inf - inf where we may have inf.
        assert not u[4:, 1].any() or np.isnan(u[4:, 1]).all()
    else:
        with jax.numpy_dtype_promotion("standard"):
            theirs = run(optax_twin(**variant), spoilt).updates
        bound = rounding_bound(np.float32, STEPS)
        np.testing.assert_allclose(u[:, 1], theirs[:, 1], rtol=bound)


@pytest.mark.parametrize("g", [6e4, 6e-8])
def test_float16_squares_neither_overflow_nor_vanish(g):
    """65504 is the largest float16 and 6e-8 the smallest; their squares are neither."""
    g = jnp.array([g], jnp.float16)
    update, _ = scale_by_rms(decay=0.75, eps=0.0).update(g, scale_by_rms().init(g))
    np.testing.assert_array_equal(update, jnp.array([2.0], jnp.float16))


def unrolled(variant):
    """A number that depends on every update, from gradients and hyperparameters."""

    def total(g, decay, eps, initial_scale):
        tx = scale_by_rms(decay, eps, initial_scale, **variant)
        u = run(tx, g, how="scan").updates
        return jnp.sum(jnp.sin(u + jnp.arange(len(g), dtype=u.dtype)[:, None]))

    return jax.jit(total)


def ten_gradients_from_zero():
    rng = np.random.default_rng(0)
    return np.concatenate([np.zeros((3, 2)), rng.normal(size=(7, 2))])


@every_variant
def test_derivatives_are_finite_through_zero_gradients(variant):
    g = jnp.asarray(ten_gradients_from_zero(), jnp.float32)
    derivative = jax.jit(jax.grad(unrolled(variant), argnums=(0, 1, 2, 3)))
    for eps in (0.0, 1e-8):
        slopes = derivative(g, 0.9, eps, 0.0)
        assert all(np.isfinite(s).all() for s in slopes)
        assert slopes[0][3:].all()
        assert slopes[1] != 0


@every_variant
@pytest.mark.parametrize("eps", first_by_default([1e-8, 1e-40, 1e-50], 2))
def test_zero_gradients_under_an_eps_that_is_known(eps, variant):
    """The last two are 0 where subnormal numbers are, or in float32."""
    tx = scale_by_rms(eps=eps, **variant)

    def update(g):
        return tx.update(g, tx.init(g))[0]

    g = jnp.zeros(3)
    np.testing.assert_array_equal(update(g), g)
    assert np.isfinite(jax.jacrev(update)(g)).all()


@pytest.mark.parametrize(
    "variant",
    first_by_default([v for v in VARIANTS if v["bias_correction"]], 2),
    ids=variant_id,
)
@x64()
def test_derivatives_are_those_of_finite_differences(variant):
    # A large eps, for the bend at sqrt(1e-8) is too sharp for finite differences.
    args = (jnp.asarray(ten_gradients_from_zero()), 0.9, 0.1, 0.5)
    check_grads(unrolled(variant), args, order=1, modes=["rev"])


@every_variant
def test_vmap_over_hyperparameters(variant):
    g = jnp.asarray(stream_for(variant, STEPS))
    decay, eps, scale = [0.5, 0.9, 0.99], [1e-8, 1e-4, 1.0], [0.0, 1.0, 2.0]

    @jax.vmap
    def run_all(decay, eps, scale):
        updates = run(scale_by_rms(decay, eps, scale, **variant), g, how="scan").updates
        return jnp.cumsum(updates, axis=0)

    together = run_all(*map(jnp.array, (decay, eps, scale)))
    for i, (d, e, s) in enumerate(zip(decay, eps, scale, strict=True)):
        alone = run(scale_by_rms(d, e, s, **variant), g).path
        # 1 - decay of a traced decay is exact to an ulp of 1 only.
        bound = rounding_bound(np.float32, STEPS) / (1 - d)
        assert relative_error(together[i], alone) < bound


@pytest.mark.parametrize("number", [np.float32, np.float64, np.array, jnp.asarray])
def test_numbers_of_every_type(number):
    g = jnp.array([1.0, 2.0])
    tx = scale_by_rms(number(0.75), number(0.0), number(0.0))
    update, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(update, [2.0, 2.0])


def run_once(params, gradients, **options):
    tx = scale_by_rms(decay=0.75, eps=0.0, **options)
    return tx.update(gradients, tx.init(params))


@every_variant
def test_none_keeps_the_state_of_its_leaf(variant):
    tx = scale_by_rms(**variant)
    g = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    _, state = tx.update(g, tx.init(g))
    update, skipped = tx.update({**g, "b": None}, state)
    expected_update, expected = tx.update(g, state)
    assert update["b"] is None
    assert_same_bits(update["a"], expected_update["a"])
    fields = ("mu", "variance") if variant["centered"] else ("nu",)
    for field in fields:
        assert_same_bits(getattr(skipped, field)["a"], getattr(expected, field)["a"])
        assert_same_bits(getattr(skipped, field)["b"], getattr(state, field)["b"])
    chex.assert_trees_all_equal_structs(skipped, state)


def test_none_parameters_and_masked_nodes_pass():
    params = {"a": jnp.ones(2), "b": None, "c": optax.MaskedNode()}
    update, state = run_once(params, params)
    np.testing.assert_array_equal(update["a"], [2.0, 2.0])
    assert update["b"] is None
    assert update["c"] == state.nu["c"] == optax.MaskedNode()
    assert state.nu["b"] is None


@pytest.mark.parametrize("centered", BOTH)
@pytest.mark.parametrize("empty", [(), {}, None, [{}, ()]])
def test_empty_trees(empty, centered):
    update, _ = run_once(empty, empty, centered=centered)
    assert update == empty


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_shapes_without_or_with_one_element(shape):
    update, state = run_once(jnp.zeros(shape), jnp.ones(shape))
    assert state.nu.shape == shape
    np.testing.assert_array_equal(update, jnp.full(shape, 2.0))


@pytest.mark.parametrize("number", [float, np.float32, np.float64])
def test_leaves_that_are_no_jax_arrays(number):
    update, state = run_once({"a": number(0)}, {"a": number(3)})
    np.testing.assert_array_equal(update["a"], 2.0)
    np.testing.assert_array_equal(state.nu["a"], 2.25)
    assert update["a"].dtype == state.nu["a"].dtype == jnp.float32


@jax.tree_util.register_pytree_node_class
class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second

    def tree_flatten(self):
        return (self.first, self.second), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_registered_pytrees():
    update, state = run_once(Pair(jnp.zeros(2), [1.0]), Pair(jnp.ones(2), [-3.0]))
    assert isinstance(update, Pair)
    assert isinstance(state.nu, Pair)
    np.testing.assert_array_equal(update.first, [2.0, 2.0])
    np.testing.assert_array_equal(update.second, [-2.0])


def test_state_fields():
    p = jnp.ones(2)
    plain = scale_by_rms(initial_scale=3.0).init(p)
    assert isinstance(plain, optax.ScaleByRmsState)
    corrected = scale_by_rms(bias_correction=True).init(p)
    assert corrected._fields == ("count", "nu")
    assert isinstance(corrected, type(optax.scale_by_rms(bias_correction=True).init(p)))
    centered = scale_by_rms(centered=True, initial_scale=3.0).init(p)
    assert isinstance(centered, optax_rms.ScaleByStddevState)
    assert centered.count is None
    np.testing.assert_array_equal(plain.nu, [3.0, 3.0])
    np.testing.assert_array_equal(centered.variance, [3.0, 3.0])
    np.testing.assert_array_equal(centered.mu, [0.0, 0.0])


@pytest.mark.parametrize("centered", BOTH)
def test_count_does_not_overflow(centered):
    tx = scale_by_rms(centered=centered, bias_correction=True)
    last = jnp.iinfo(jnp.int32).max
    state = tx.init(jnp.ones(2))._replace(count=jnp.array(last))
    update, state = tx.update(jnp.ones(2), state)
    assert state.count == last
    assert np.isfinite(update).all()


def test_a_decay_of_zero_has_no_nan_on_the_way():
    gradients = jnp.array([3.0, -4.0])
    tx = scale_by_rms(decay=0.0, eps=0.0, bias_correction=True)
    with jax.debug_nans(True):
        updates, _ = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates, [1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize("centered", BOTH)
@pytest.mark.parametrize("bias_correction", BOTH)
@pytest.mark.parametrize("decay", [0.0, 1e-40, 0.5, jnp.float32(0.0)], ids=repr)
def test_an_overflown_square_gives_no_nan(centered, bias_correction, decay):
    """At a decay of 0 it is forgotten, where 0 times infinity would be NaN."""
    tx = scale_by_rms(decay, centered=centered, bias_correction=bias_correction)
    state = tx.init(jnp.zeros(2))
    for g in (1e38, -1e38, 1.0, 2.0):
        updates, state = tx.update(jnp.array([g, 1.0]), state)
        assert not np.isnan(updates).any()
    if decay < 0.1 and not centered:
        np.testing.assert_allclose(updates, [1.0, 1.0], rtol=1e-6)
