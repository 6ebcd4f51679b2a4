# SPDX-License-Identifier: Apache-2.0
"""The Keras dialect against Keras, and runs handed over to and fro."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.keras_runs import (
    BOUND,
    EPSILON,
    Rates,
    built_optimizer,
    join,
    keras,
    path_error,
    run_dialect,
    run_keras,
    run_keras_eagerly,
    split,
    standard_promotion,
    stream_for,
)
from helpers.reference import DIALECTS, gradient_stream, rmsprop
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_rms.dialects import keras as dialect
from optax_rms.dialects._shared import chain_state
from optax_rms.dialects.keras import _schedules as schedules

pytestmark = [
    pytest.mark.parity,
    # Raised within Keras by its variables' method numpy().
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def slots_of(state):
    """The state in Keras' words and units."""
    fields = chain_state.fields(state.inner_state)
    slots = {
        "average": state.average,
        "gradient_accumulator": state.accumulated,
        "velocity": fields.get("nu"),
        "momentum": jax.tree.map(np.negative, fields.get("trace")),
        "average_gradient": fields.get("mu"),
    }
    if "variance" in fields:
        slots["velocity"] = jax.tree.map(
            lambda s, m: s + m**2, fields["variance"], fields["mu"]
        )
    return {slot: tree for slot, tree in slots.items() if tree is not None}


def compare(stream, start=1.0, **options):
    """Worst differences from Keras of parameters and state, of their path and size."""
    params, gradients = split(np.full(stream.shape[1:], start, "f")), split(stream)
    optimizer, variables = built_optimizer(params, **options)
    expected, expected_slots = run_keras(optimizer, variables, gradients)
    actual, state, _ = run_dialect(dialect.rmsprop(**options), params, gradients)
    errors = {"parameters": path_error(join(actual), join(expected), start)}
    slots = slots_of(state)
    for slot, tree in slots.items():
        theirs = {name: expected_slots[f"{name}_{slot}"] for name in params}
        errors[slot] = size_error(join(tree), join(theirs))
    assert len(expected_slots) == len(params) * len(slots) + len(
        {"iteration", "learning_rate"} & expected_slots.keys()
    )
    np.testing.assert_array_equal(state.count, expected_slots["iteration"])
    return errors


def size_error(actual, expected):
    """Worst difference, relative to the largest number that the element ever had."""
    size = np.max(np.abs(expected), axis=0)
    return np.max(np.abs(actual - expected) / np.where(size == 0, 1, size))


OPTIONS = {
    "default": {},
    "rho": {"rho": 0.99},
    "momentum": {"momentum": 0.9},
    "epsilon": {"epsilon": 1e-3},
    "centered": {"centered": True},
    "weight_decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.7},
    "clipvalue": {"clipvalue": 0.02},
    "global_clipnorm": {"global_clipnorm": 0.7},
    "use_ema": {"use_ema": True},
    "ema_momentum": {"use_ema": True, "ema_momentum": 0.7},
    "ema_overwrite_frequency": {"use_ema": True, "ema_overwrite_frequency": 3},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_alone(options):
    options = {"learning_rate": Rates(), "epsilon": EPSILON} | options
    errors = compare(stream_for(1000, options), **options)
    assert all(error <= BOUND for error in errors.values()), errors


@st.composite
def combinations(draw):
    """Any options of Keras, with limits where they show."""
    options = {
        "learning_rate": draw(st.sampled_from([Rates(), 0.01])),
        # Centered without a past, there is no variance, and Keras divides by rounding.
        "rho": draw(st.sampled_from([0.5, 0.9, 0.99])),
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "epsilon": draw(st.sampled_from([EPSILON, 1e-3])),
        "centered": draw(st.booleans()),
        # Slower decay would be short of the rounding of a parameter that does not move.
        "weight_decay": draw(st.sampled_from([None, 0.5, 5.0])),
        "use_ema": draw(st.booleans()),
        "ema_momentum": draw(st.sampled_from([0.0, 0.5, 0.99])),
        "ema_overwrite_frequency": draw(st.sampled_from([None, 1, 4])),
        "gradient_accumulation_steps": draw(st.sampled_from([None, 2, 5])),
    }
    kind = draw(st.sampled_from([None, "clipnorm", "clipvalue", "global_clipnorm"]))
    if kind is not None:
        options[kind] = draw(st.sampled_from([0.5, 3.0]))
    return options


@given(combinations())
@settings(max_examples=10, derandomize=True, deadline=None)
def test_options_together(options):
    errors = compare(stream_for(200, options), **options)
    assert all(error <= BOUND for error in errors.values()), (options, errors)


def keras_trajectory(stream, **options):
    start = split(np.ones(stream.shape[1:], "f"))
    return join(run_keras(*built_optimizer(start, **options), split(stream))[0])


@pytest.mark.parametrize("centered", [False, True])
def test_rejects_every_other_dialect(centered):
    stream = stream_for(200, {"centered": centered})
    options = {"momentum": 0.9, "centered": centered, "epsilon": EPSILON}
    theirs = keras_trajectory(stream, learning_rate=Rates(), **options)
    options["eps"] = options.pop("epsilon")

    def error(**dialect):
        expected = rmsprop(stream, Rates.array(200), params=1.0, **options, **dialect)
        return path_error(theirs, expected, start=1.0)

    errors = {name: error(**settings) for name, settings in DIALECTS.items()}
    errors["nesterov"] = error(nesterov=True)
    errors["bias_correction"] = error(bias_correction=True)
    assert errors.pop("optax") <= BOUND
    assert all(error >= 100 * BOUND for error in errors.values()), errors


def test_rejects_every_other_decay():
    stream = gradient_stream(200, EPSILON)
    theirs = keras_trajectory(stream, learning_rate=Rates(), weight_decay=0.5)

    def error(**options):
        expected = rmsprop(stream, Rates.array(200), eps=EPSILON, params=1.0, **options)
        return path_error(theirs, expected, start=1.0)

    assert error(weight_decay=0.5, decoupled=True) <= BOUND
    assert error(weight_decay=0.5) >= 100 * BOUND
    assert error() >= 100 * BOUND
    assert error(weight_decay=0.49, decoupled=True) >= 100 * BOUND


def test_rejects_every_other_order():
    """Settings that differ in what happens first, or in what counts, show as well."""
    stream = gradient_stream(200, EPSILON)
    params, gradients = split(np.ones(12, "f")), split(stream)

    def trajectory(**options):
        tx = dialect.rmsprop(**{"learning_rate": Rates(), **options})
        return join(run_dialect(tx, params, gradients)[0])

    def error(theirs, **options):
        return path_error(trajectory(**options), theirs, start=1.0)

    # The norm of a mean of gradients, not a mean of clipped gradients.
    together = {"clipnorm": 0.7, "gradient_accumulation_steps": 4}
    theirs = keras_trajectory(stream, learning_rate=Rates(), **together)
    assert error(theirs, **together) <= BOUND
    for other in (
        {"clipnorm": None, "clipvalue": 0.7},
        {"clipnorm": None, "global_clipnorm": 0.7},
        # A schedule of the number of steps.
        {"learning_rate": lambda count: Rates()(count // 4)},
    ):
        assert error(theirs, **(together | other)) >= 100 * BOUND, other
    averaging = {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 4}
    theirs = keras_trajectory(stream, learning_rate=Rates(), **averaging)
    assert error(theirs, **averaging) <= BOUND
    for other in (
        {"ema_momentum": 0.89},
        {"ema_overwrite_frequency": None},
        {"ema_overwrite_frequency": 3},
    ):
        assert error(theirs, **(averaging | other)) >= 100 * BOUND, other


SCHEDULES = keras.optimizers.schedules


@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULES.CosineDecay(0.1, 100, alpha=0.1),
        SCHEDULES.CosineDecay(0.1, 100, warmup_target=0.3, warmup_steps=10),
        SCHEDULES.CosineDecay(0.1, 100, warmup_steps=10),
        SCHEDULES.CosineDecayRestarts(0.1, 10, t_mul=1.0, m_mul=0.9, alpha=0.1),
        SCHEDULES.CosineDecayRestarts(0.1, 10, t_mul=1.5, m_mul=0.9),
        SCHEDULES.ExponentialDecay(0.1, 7, 0.9),
        SCHEDULES.ExponentialDecay(0.1, 8, 0.9, staircase=True),
        SCHEDULES.InverseTimeDecay(0.1, 7, 0.5),
        SCHEDULES.InverseTimeDecay(0.1, 8, 0.5, staircase=True),
        SCHEDULES.PiecewiseConstantDecay([3, 10, 50], [1.0, 0.5, 0.2, 0.1]),
        SCHEDULES.PolynomialDecay(0.1, 50),
        SCHEDULES.PolynomialDecay(0.1, 50, 0.01, power=2.0),
        SCHEDULES.PolynomialDecay(0.1, 50, 0.01, power=0.5, cycle=True),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_schedules(schedule):
    steps = jnp.arange(200)
    expected = standard_promotion(jax.jit(jax.vmap(schedule)))(steps)
    # A dozen roundings of numbers up to the largest rate.
    tolerance = 12 * np.finfo(np.float32).eps * float(jnp.max(expected))
    for converted in (
        schedules.from_object(schedule),
        schedules.from_config(keras.optimizers.schedules.serialize(schedule)),
    ):
        actual = jax.jit(jax.vmap(converted))(steps)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_staircase_is_exact():
    """Compiled, Keras' quotient of 41 by 41 is below 1; step by step, it is not."""
    schedule = SCHEDULES.InverseTimeDecay(0.1, 41, 0.5, staircase=True)
    ours = jax.jit(schedules.from_object(schedule))
    assert ours(41) == standard_promotion(schedule)(41) == np.float32(0.1) / 1.5


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("overwrites", [False, True])
def test_missing_gradients(overwrites):
    """Keras does not move, nor shrink, what has no gradient, but it averages it."""
    # An odd number: something is accumulated when the gradients begin to be missing.
    params, gradients = split(np.ones(12, "f")), split(gradient_stream(21))
    options = {"weight_decay": 0.5, "momentum": 0.9, "gradient_accumulation_steps": 2}
    options |= {"use_ema": True, "ema_overwrite_frequency": 2 if overwrites else None}
    optimizer, variables = built_optimizer(params, **options)
    tx = dialect.rmsprop(**options)
    _, _, (ours, state) = run_dialect(tx, params, gradients)
    run_keras(optimizer, variables, gradients)
    gradients = {"bias": gradients["bias"], "kernel": None}
    theirs, slots = run_keras(optimizer, variables, gradients)

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        assert (updates["kernel"] is None) == (not overwrites)
        moved = {k: params[k] + u for k, u in updates.items() if u is not None}
        return params | moved, state

    for g in gradients["bias"]:
        ours, state = step(ours, state, {"bias": g, "kernel": None})
    for name in params:
        np.testing.assert_allclose(ours[name], theirs[name][-1], rtol=BOUND)
        for slot, tree in slots_of(state).items():
            expected = slots[f"{name}_{slot}"][-1]
            scale = np.max(np.abs(expected))
            np.testing.assert_allclose(tree[name], expected, BOUND, BOUND * scale)


def test_no_gradient_at_all():
    optimizer, variables = built_optimizer({"bias": np.ones(2, "f")})
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None], variables)
    tx = dialect.rmsprop()
    params = {"bias": jnp.ones(2)}
    with pytest.raises(ValueError, match="gradients must not all be None"):
        tx.update({"bias": None}, tx.init(params), params)


def test_centered_is_finite_where_keras_is_not():
    """Constant gradients; compiled, Keras is mere rounding instead of NaN."""
    stream = np.tile(np.linspace(0.1, 1000, 300, dtype="f"), (150, 1))
    params, gradients = split(np.ones(300, "f")), split(stream)
    theirs = run_keras_eagerly(*built_optimizer(params, centered=True), gradients)
    assert np.isnan(theirs[-1]).any()
    ours, state, _ = run_dialect(dialect.rmsprop(centered=True), params, gradients)
    assert np.isfinite(join(ours)).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("kind", ["clipnorm", "clipvalue", "global_clipnorm"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_clipping_of_infinity_and_nan(kind, bad):
    stream = np.ones((1, 12), "f")
    stream[0, 5] = bad
    theirs = keras_trajectory(stream, **{kind: 0.5})
    tx = dialect.rmsprop(**{kind: 0.5})
    ours, _, _ = run_dialect(tx, split(np.ones(12, "f")), split(stream))
    np.testing.assert_allclose(join(ours), theirs, rtol=BOUND)
    assert np.isnan(theirs).all() == (kind == "global_clipnorm")


def test_exclude_from_weight_decay():
    params, gradients = split(np.ones(12, "f")), split(gradient_stream(50, EPSILON))
    options = {"weight_decay": 0.5, "global_clipnorm": 1.0, "learning_rate": Rates()}
    optimizer, variables = built_optimizer(params, excluded=["bias"], **options)
    mask = {"bias": True, "kernel": False}
    imported, _ = dialect.import_state(optimizer, dict, learning_rate=Rates())
    theirs = join(run_keras(optimizer, variables, gradients)[0])
    everywhere = dialect.rmsprop(**options)
    for tx in (
        imported,
        dialect.rmsprop(exclude_from_weight_decay=mask, **options),
        dialect.rmsprop(exclude_from_weight_decay=lambda params: mask, **options),
    ):
        ours = join(run_dialect(tx, params, gradients)[0])
        assert path_error(ours, theirs, start=1.0) <= BOUND
    ours = join(run_dialect(everywhere, params, gradients)[0])
    assert path_error(ours, theirs, start=1.0) >= 100 * BOUND
