# SPDX-License-Identifier: Apache-2.0
"""The optimizer against Optax and against the float64 reference."""

import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.on_request import first_by_default
from helpers.reference import DIALECTS, gradient_stream, relative_error
from helpers.reference import rmsprop as reference_rmsprop
from helpers.running import run
from helpers.trajectory import (
    alternating_stream,
    rounding_bound,
    three_dtypes,
    x64,
)

from optax_rms import rmsprop

STEPS = 12
BOTH = [False, True]
MOMENTA = [
    {"momentum": None},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
]


def changing_rate(count):
    return jnp.where(count < STEPS // 2, 0.01, 0.03)


RATES = [0.01] * (STEPS // 2) + [0.03] * (STEPS - STEPS // 2)


def test_positional_arguments_are_those_of_optax():
    ours = list(inspect.signature(rmsprop).parameters.values())
    theirs = list(inspect.signature(optax.rmsprop).parameters.values())
    shared = [(p.name, p.kind, p.default) for p in ours[: len(theirs)]]
    assert shared == [(p.name, p.kind, p.default) for p in theirs]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    "momentum",
    first_by_default(MOMENTA[::-1]),
    ids=["nesterov", "momentum", "plain"],
)
@pytest.mark.parametrize("centered", BOTH)
@pytest.mark.parametrize("eps_in_sqrt", first_by_default(BOTH))
@x64()
def test_trajectory_is_that_of_optax(eps_in_sqrt, centered, momentum):
    stream = alternating_stream if centered else gradient_stream
    gradients = three_dtypes(stream(STEPS))
    for bias_correction, initial_scale, rate in itertools.product(
        BOTH, [0.0, 1.0], [0.01, changing_rate]
    ):
        options = {
            "learning_rate": rate,
            "initial_scale": initial_scale,
            "eps_in_sqrt": eps_in_sqrt,
            "centered": centered,
            "bias_correction": bias_correction,
            **momentum,
        }
        ours = run(rmsprop(**options), gradients).path
        # Optax's bias correction needs the standard promotion.
        with jax.numpy_dtype_promotion("standard"):
            theirs = run(optax.rmsprop(**options), gradients).path
        for name, g in gradients.items():
            bound = rounding_bound(g.dtype, STEPS)
            assert relative_error(ours[name], theirs[name]) < bound, (name, options)


@pytest.mark.parametrize("momentum", MOMENTA, ids=["plain", "momentum", "nesterov"])
@pytest.mark.parametrize("rate", [0.01, changing_rate], ids=["fixed", "schedule"])
@pytest.mark.parametrize("bias_correction", BOTH)
def test_uncentered_optax_checkpoint_restores_unchanged(
    bias_correction, rate, momentum
):
    options = {"bias_correction": bias_correction, **momentum}
    theirs, ours = optax.rmsprop(rate, **options), rmsprop(rate, **options)
    g = jnp.asarray(gradient_stream(STEPS))
    params = {"a": g[0], "b": [g[1], g[2, 0]]}
    state = theirs.init(params)
    for t in (3, 4):
        gradients = jax.tree.map(lambda p, t=t: p + t, params)
        with jax.numpy_dtype_promotion("standard"):
            _, state = theirs.update(gradients, state)
    chex.assert_trees_all_equal_structs(state, ours.init(params))
    types = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert types == jax.tree.map(lambda x: (x.shape, x.dtype), ours.init(params))

    with jax.numpy_dtype_promotion("standard"):
        expected, expected_state = theirs.update(params, state)
    update, next_state = ours.update(params, state)
    for actual, wanted in ((update, expected), (next_state, expected_state)):
        jax.tree.map(
            lambda a, w: np.testing.assert_allclose(
                a, w, rtol=rounding_bound(np.float32, 1)
            ),
            actual,
            wanted,
        )
    assert optax.tree.get(next_state, "nu")["b"][1].shape == ()


@pytest.mark.parametrize("centered", BOTH)
@pytest.mark.parametrize("nesterov", BOTH)
@pytest.mark.parametrize("dialect", DIALECTS)
@x64()
def test_each_dialect_is_told_from_the_others(dialect, nesterov, centered):
    options = {"centered": centered, "momentum": 0.9, "nesterov": nesterov}
    g = (alternating_stream if centered else gradient_stream)(STEPS).astype(np.float64)
    ours = run(rmsprop(changing_rate, **options, **DIALECTS[dialect]), g).path
    errors = {
        name: relative_error(ours, reference_rmsprop(g, RATES, **options, **flags))
        for name, flags in DIALECTS.items()
    }
    bound = rounding_bound(np.float64, STEPS)
    assert errors.pop(dialect) < bound
    assert min(errors.values()) > 1e-2


@pytest.mark.parametrize("lr_in_momentum", BOTH)
@pytest.mark.parametrize("bias_correction", BOTH)
@pytest.mark.parametrize("initial_scale", [0.0, 1.0])
@x64()
def test_trajectory_follows_the_formula(initial_scale, bias_correction, lr_in_momentum):
    g = gradient_stream(STEPS).astype(np.float64)
    for momentum, eps_in_sqrt in itertools.product(MOMENTA, BOTH):
        options = {
            "decay": 0.7,
            "eps": 1e-8,
            "initial_scale": initial_scale,
            "bias_correction": bias_correction,
            "lr_in_momentum": lr_in_momentum,
            "eps_in_sqrt": eps_in_sqrt,
            **momentum,
        }
        ours = run(rmsprop(changing_rate, **options), g).path
        expected = reference_rmsprop(g, RATES, **options)
        bound = rounding_bound(np.float64, STEPS)
        assert relative_error(ours, expected) < bound, options


@pytest.mark.parametrize("lr_in_momentum", BOTH)
def test_place_of_the_learning_rate_shows_when_the_rate_changes(lr_in_momentum):
    g = gradient_stream(STEPS)
    inside = run(rmsprop(0.01, momentum=0.9), g).path
    either = run(rmsprop(0.01, momentum=0.9, lr_in_momentum=lr_in_momentum), g).path
    assert relative_error(either, inside) < rounding_bound(np.float32, STEPS)


@pytest.mark.parametrize("nesterov", BOTH)
def test_momentum_of_zero_is_no_momentum(nesterov):
    g = gradient_stream(STEPS)
    plain = run(rmsprop(0.01, nesterov=nesterov), g).path
    zero = run(rmsprop(0.01, momentum=0.0, nesterov=nesterov), g).path
    np.testing.assert_array_equal(zero, plain)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("momentum", MOMENTA, ids=["plain", "momentum", "nesterov"])
def test_half_precision_is_float32_rounded_once(momentum, dtype):
    """But for products and sums that a compiler contracts in one program only."""
    g = jnp.asarray(gradient_stream(STEPS), dtype)
    tx = rmsprop(0.01, centered=True, **momentum)
    half, single = tx.init(g[0]), tx.init(g[0].astype(jnp.float32))
    states = [[], []]
    bound, rounding = rounding_bound(np.float32, STEPS), float(jnp.finfo(dtype).eps) / 2
    for t in range(STEPS):
        update, half = tx.update(g[t], half)
        expected, single = tx.update(g[t].astype(jnp.float32), single)
        assert update.dtype == dtype
        np.testing.assert_allclose(
            update.astype(jnp.float32),
            expected,
            rtol=rounding + bound,
            atol=bound * float(abs(expected).max()),
        )
        assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("float32")}
        for state, path in zip((half, single), states, strict=True):
            path.append(jax.tree.leaves(state))
    ours, theirs = (map(np.stack, zip(*path, strict=True)) for path in states)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < bound


@pytest.mark.parametrize(
    ("options", "bytes_per_element"),
    [
        ({}, 4),
        ({"momentum": 0.9}, 8),
        ({"centered": True}, 8),
        ({"centered": True, "momentum": 0.9}, 12),
        ({"centered": True, "momentum": 0.9, "accumulator_dtype": "bfloat16"}, 6),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bytes_of_state_per_element(options, bytes_per_element, dtype):
    state = jax.eval_shape(rmsprop(0.1, **options).init, jnp.zeros(1000, dtype))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert total == 1000 * bytes_per_element


@pytest.mark.parametrize("lr_in_momentum", BOTH)
@pytest.mark.parametrize("nesterov", BOTH)
def test_vmap_over_hyperparameters(nesterov, lr_in_momentum):
    g = jnp.asarray(gradient_stream(STEPS))
    options = {"nesterov": nesterov, "lr_in_momentum": lr_in_momentum}
    rates, momenta = [0.0, 0.1, 1.0], [0.0, 0.5, 0.9]
    decays, eps = [0.5, 0.9, 0.99], [1e-8, 1e-4, 1.0]

    def build(rate, momentum, decay, eps):
        return rmsprop(rate, decay, eps, momentum=momentum, **options)

    @jax.vmap
    def run_all(*hyperparameters):
        updates = run(build(*hyperparameters), g, how="scan").updates
        return jnp.cumsum(updates, axis=0)

    values = (rates, momenta, decays, eps)
    together = run_all(*map(jnp.array, values))
    for i, hyperparameters in enumerate(zip(*values, strict=True)):
        alone = run(build(*hyperparameters), g).path
        # 1 - decay of a traced decay is exact to an ulp of 1 only.
        bound = rounding_bound(np.float32, STEPS) / (1 - hyperparameters[2])
        assert relative_error(together[i], alone) < bound


def test_schedule_starts_at_zero_and_counts_on():
    seen = []

    def schedule(count):
        seen.append(int(count))
        return jnp.array(0.5)

    tx = rmsprop(schedule, decay=0.0, eps=0.0)
    state = tx.init(jnp.zeros(2))
    for step in range(3):
        assert optax.tree.get(state, "count") == step
        update, state = tx.update(jnp.array([3.0, -4.0]), state)
        np.testing.assert_array_equal(update, [-0.5, 0.5])
    assert seen == [0, 1, 2]


def test_none_keeps_average_and_momentum():
    tx = rmsprop(0.1, momentum=0.9)
    g = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    _, state = tx.update(g, tx.init(g))
    update, skipped = tx.update({**g, "b": None}, state)
    expected_update, expected = tx.update(g, state)
    assert update["b"] is None
    np.testing.assert_array_equal(update["a"], expected_update["a"])
    for field in ("nu", "trace"):
        kept, before, after = (
            optax.tree.get(s, field) for s in (skipped, state, expected)
        )
        np.testing.assert_array_equal(kept["a"], after["a"])
        np.testing.assert_array_equal(kept["b"], before["b"])
        assert kept["b"] != after["b"]


@pytest.mark.parametrize("momentum", MOMENTA, ids=["plain", "momentum", "nesterov"])
def test_derivatives_are_finite_through_training_from_zero_gradients(momentum):
    """Of the last loss by start and hyperparameters; the first two losses are flat."""
    weights = jnp.array([0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1.0, 2.0, 1.0, 1.0])
    options = {"centered": True, **momentum}

    def train(start, rate, decay, eps):
        tx = rmsprop(rate, decay, eps, **options)

        def step(carry, weight):
            params, state = carry
            loss, g = jax.value_and_grad(lambda p: weight * jnp.sum(p**2))(params)
            updates, state = tx.update(g, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (start, tx.init(start)), weights)[1][-1]

    derivative = jax.jit(jax.grad(train, argnums=(0, 1, 2, 3)))
    for eps in (0.0, 1e-8):
        slopes = derivative(jnp.array([1.0, -2.0]), 0.1, 0.9, eps)
        assert all(np.isfinite(s).all() for s in slopes)
        assert np.all(slopes[0] != 0)
        assert slopes[1] != 0
