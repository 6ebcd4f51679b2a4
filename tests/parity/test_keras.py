# SPDX-License-Identifier: Apache-2.0
"""The Keras dialect against Keras, and runs handed over to and fro."""

import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from frameworks import require
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DIALECTS, gradient_stream, relative_error, rmsprop
from trajectory import alternating_stream

from optax_rms.dialects import _handover as handover
from optax_rms.dialects import _keras_schedules as schedules
from optax_rms.dialects import keras as dialect

with warnings.catch_warnings():
    # Not ours to fix: Keras and what it imports use what others have deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    keras = require("keras")
h5py = require("h5py")

pytestmark = [
    pytest.mark.parity,
    # Raised within Keras by its variables' method numpy().
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

# The issue's: 2e-5 of the length of the path.
BOUND = 2e-5
EPSILON = 1e-7


def standard_promotion(function):
    """Keras mixes dtypes."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped


class Rates(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that changes at every step, by up to a factor of ten."""

    def __call__(self, step):
        return 10 ** (jnp.sin(1.7 * jnp.asarray(step, float)) / 2) * 0.02

    @staticmethod
    def array(steps):
        return 10 ** (np.sin(1.7 * np.arange(steps)) / 2) * 0.02


def split(columns):
    """Two parameters of different shapes, with a different norm each."""
    columns = np.asarray(columns)
    first = columns.shape[-1] // 3
    shape = (*columns.shape[:-1], 2, first)
    return {"bias": columns[..., :first], "kernel": columns[..., first:].reshape(shape)}


def join(tree):
    """The inverse of `split`."""
    kernel = tree["kernel"]
    return np.concatenate(
        [tree["bias"], np.reshape(kernel, (*kernel.shape[:-2], -1))], axis=-1
    )


def built_optimizer(params, excluded=None, **options):
    """An optimizer of Keras, and the variables that it is built for."""
    variables = [keras.Variable(value, name=name) for name, value in params.items()]
    optimizer = keras.optimizers.RMSprop(**options)
    if excluded:
        optimizer.exclude_from_weight_decay(var_names=excluded)
    optimizer.build(variables)
    return optimizer, variables


@standard_promotion
def run_keras(optimizer, variables, gradients):
    """Trajectories of the parameters and of the optimizer's variables, by name.

    The steps are those of Keras' own training loop on JAX; the variables are left as
    after the last of them.
    """

    @jax.jit
    def run(carry, gradients):
        def step(carry, gradients):
            carry = optimizer.stateless_apply(carry[1], gradients, carry[0])
            return carry, carry

        return jax.lax.scan(step, carry, gradients)

    everything = (variables, optimizer.variables)
    start = tuple([v.value for v in vs] for vs in everything)
    last, trajectories = run(start, [gradients[v.name] for v in variables])
    for vs, values in zip(everything, last, strict=True):
        for v, value in zip(vs, values, strict=True):
            v.assign(value)
    return [
        {v.name: np.asarray(x) for v, x in zip(vs, xs, strict=True)}
        for vs, xs in zip(everything, trajectories, strict=True)
    ]


@standard_promotion
def run_keras_eagerly(optimizer, variables, gradients):
    """The trajectory of the parameters, step by step, on any backend."""
    trajectory = []
    for t in range(len(gradients["bias"])):
        arrays = [keras.ops.convert_to_tensor(gradients[v.name][t]) for v in variables]
        optimizer.apply(arrays, variables)
        trajectory.append(join({v.name: np.array(v.numpy()) for v in variables}))
    return np.stack(trajectory)


def run_dialect(tx, params, gradients, state=None):
    """Trajectories of the parameters and of the state, and the last of both."""

    @jax.jit
    def run(carry, gradients):
        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            carry = optax.apply_updates(params, updates), state
            return carry, carry

        return jax.lax.scan(step, carry, gradients)

    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params) if state is None else state
    last, trajectory = run((params, state), jax.tree.map(jnp.asarray, gradients))
    return *jax.tree.map(np.asarray, trajectory), last


def slots_of(state):
    """The state in Keras' words and units."""
    fields = handover.fields(state.inner_state)
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


def compare(stream, steps_compared=None, start=1.0, **options):
    """Worst differences from Keras of parameters and state, of their path and size."""
    gradients, params = (
        split(stream),
        split(np.full(stream.shape[1:], start, "float32")),
    )
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


def path_error(trajectory, expected, start=0.0):
    return relative_error(np.float64(trajectory) - start, np.float64(expected) - start)


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


def stream_for(steps, options):
    """Gradients on which the options show, and Keras' own rounding does not.

    Centred, Keras subtracts: it is compared where the variance is most of E[g^2], as
    the signs alternate, from step to step and not from call to call.
    """
    if options.get("centered"):
        calls = options.get("gradient_accumulation_steps") or 1
        return np.repeat(alternating_stream(steps, EPSILON), calls, axis=0)[:steps]
    return gradient_stream(steps, EPSILON)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_alone(options):
    options = {"learning_rate": Rates(), "epsilon": EPSILON} | options
    errors = compare(stream_for(1000, options), **options)
    print(errors)
    assert max(errors.values()) <= BOUND, errors


@st.composite
def combinations(draw):
    """Any options of Keras, with limits where they show."""
    options = {
        "learning_rate": draw(st.sampled_from([Rates(), 0.01])),
        # Centred without a past, there is no variance, and Keras divides by rounding.
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
    kinds = ("clipnorm", "clipvalue", "global_clipnorm")
    kind = draw(st.sampled_from([None, *kinds]))
    return (
        options
        if kind is None
        else {**options, kind: draw(st.sampled_from([0.5, 3.0]))}
    )


@given(combinations())
@settings(max_examples=15, derandomize=True, deadline=None)
def test_options_together(options):
    errors = compare(stream_for(200, options), **options)
    print(errors)
    assert max(errors.values()) <= BOUND, (options, errors)


def keras_trajectory(stream, **options):
    optimizer, variables = built_optimizer(
        split(np.ones(stream.shape[1:], "f")), **options
    )
    return join(run_keras(optimizer, variables, split(stream))[0])


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
    print(errors)
    assert errors.pop("optax") <= BOUND
    assert min(errors.values()) >= 100 * BOUND, errors


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
        {"clipnorm": None},
        {"clipnorm": None, "clipvalue": 0.7},
        {"clipnorm": None, "global_clipnorm": 0.7},
        {"gradient_accumulation_steps": 5},
        # A schedule of the number of steps.
        {"learning_rate": lambda count: Rates()(count // 4)},
    ):
        assert error(theirs, **(together | other)) >= 100 * BOUND, other
    averaging = {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 4}
    theirs = keras_trajectory(stream, learning_rate=Rates(), **averaging)
    assert error(theirs, **averaging) <= BOUND
    for other in (
        {"use_ema": False},
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
def test_clipping_of_what_is_not_finite(kind, bad):
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


# Handing over.


def convert(arrays):
    """To a tree with other names, in another order, transposed."""
    return {
        "layer": {"weight": jnp.asarray(arrays["kernel"]).T},
        "shift": jnp.asarray(arrays["bias"]),
    }


def convert_back(params):
    return {"bias": params["shift"], "kernel": params["layer"]["weight"].T}


HANDED_OVER = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"momentum": 0.9, "centered": True},
    "ema": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 10},
    "accumulation": {"momentum": 0.9, "gradient_accumulation_steps": 4},
    "schedule": {"learning_rate": SCHEDULES.CosineDecay(0.01, 60), "momentum": 0.5},
    "decay": {"learning_rate": 0.02, "weight_decay": 0.5, "clipnorm": 1.0},
}


def train(optimizer, variables, gradients):
    """The trajectory of the parameters in Keras."""
    if keras.backend.backend() != "jax":
        return run_keras_eagerly(optimizer, variables, gradients)
    return join(run_keras(optimizer, variables, gradients)[0])


def hand_over_and_back(options, keras_steps=25, steps=25):
    """The error of a run in Keras, JAX and Keras again, beside one in Keras alone."""
    total = 2 * keras_steps + steps
    stream = stream_for(total, options)
    # Only decay needs something to begin with, and what stays at 0 does so exactly.
    start = 1.0 if "weight_decay" in options else 0.0
    params, gradients = split(np.full(stream.shape[1], start, "f")), split(stream)

    def part(start, stop):
        return {name: g[start:stop] for name, g in gradients.items()}

    expected = train(*built_optimizer(params, **options), gradients)
    first, variables = built_optimizer(params, **options)
    legs = [train(first, variables, part(0, keras_steps))]
    tx, state = dialect.import_state(first, convert)
    weights = convert({v.name: v.numpy() for v in variables})
    middle = [
        convert(dict(zip(gradients, leaves, strict=True)))
        for leaves in zip(*part(keras_steps, keras_steps + steps).values(), strict=True)
    ]
    middle = jax.tree.map(lambda *leaves: np.stack(leaves), *middle)
    trajectory, _, (weights, state) = run_dialect(tx, weights, middle, state)
    kernel = np.swapaxes(trajectory["layer"]["weight"], 1, 2)
    legs.append(join({"bias": trajectory["shift"], "kernel": kernel}))

    weights = {name: np.asarray(w) for name, w in convert_back(weights).items()}
    last, variables = built_optimizer(weights, **options)
    last.load_own_variables(dialect.export_state(state, convert_back, like=last))
    legs.append(train(last, variables, part(total - keras_steps, total)))
    return path_error(np.concatenate(legs), expected, start)


@pytest.mark.parametrize("options", HANDED_OVER.values(), ids=HANDED_OVER)
def test_hand_over_and_back(options):
    error = hand_over_and_back(options)
    print(error)
    assert error <= BOUND


def test_hand_over_from_another_backend():
    """Keras on PyTorch: its arrays are read, and its schedule is traced by JAX."""
    code = (
        "import test_keras as t\n"
        "assert t.keras.backend.backend() == 'torch'\n"
        "options = {**t.HANDED_OVER['schedule'], **t.HANDED_OVER['accumulation']}\n"
        "print(t.hand_over_and_back(options))"
    )
    here = pathlib.Path(__file__).parent
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={
            **os.environ,
            "KERAS_BACKEND": "torch",
            "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, *sys.path))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert printed.returncode == 0, printed.stderr
    assert float(printed.stdout.splitlines()[-1]) <= BOUND


# Files.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with numbers in its optimizer, and the folder that it is saved in."""
    layers = keras.layers
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.Dense(1)])
    rate = SCHEDULES.ExponentialDecay(0.01, 10, 0.5)
    options = {"momentum": 0.9, "centered": True, "use_ema": True}
    model.compile(
        keras.optimizers.RMSprop(rate, gradient_accumulation_steps=2, **options)
    )
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    for v in model.optimizer.variables:
        # No variance is negative.
        low = 1.0 if v.name.endswith("_velocity") else 0.5
        v.assign(5 if v.name == "iteration" else rng.uniform(low, 2 * low, v.shape))
    folder = tmp_path_factory.mktemp("keras")
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    return model, folder


def names_of(model):
    return [v.path for v in model.trainable_variables]


def flat(arrays):
    """A conversion that keeps everything."""
    return {name.replace("/", "_"): jnp.asarray(x) for name, x in arrays.items()}


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_every_source_holds_the_same(saved):
    model, folder = saved
    optimizer, names = model.optimizer, names_of(model)
    config = optimizer.get_config()
    tx, expected = dialect.import_state(optimizer, flat)
    assert expected.count == 5
    exported = dialect.export_state(expected, dict, like=optimizer)
    sources = [
        (optimizer, names, None),
        (folder / "model.keras", names, None),
        (str(folder / "model.keras"), names, config),
        (folder / "model.weights.h5", names, config),
        (folder / "model.weights.h5", names, keras.optimizers.serialize(optimizer)),
        (optimizer.variables, None, config),
        ([v.value for v in optimizer.variables], names, config),
        (exported, names, config),
    ]
    gradients = jax.tree.map(jnp.ones_like, expected.average)
    updates, _ = tx.update(gradients, expected, gradients)
    for i, (source, own_names, own_config) in enumerate(sources):
        tx, state = dialect.import_state(source, flat, own_names, config=own_config)
        assert_same(state, expected)
        if i == 1:
            assert_same(tx.update(gradients, state, gradients)[0], updates)
        back = dialect.export_state(
            state, back_to(own_names), own_names, like=source, config=own_config
        )
        assert_same(back, exported)
    # All but the velocity, where rounding may be one of several that come back.
    for i, v in enumerate(optimizer.variables):
        if not v.name.endswith("_velocity"):
            np.testing.assert_array_equal(exported[str(i)], v.value)
        np.testing.assert_allclose(exported[str(i)], v.value, rtol=1e-6)


def back_to(names):
    """The inverse of `flat`."""
    slashed = {name.replace("/", "_"): name for name in names or ()}
    return lambda params: {slashed.get(name, name): x for name, x in params.items()}


def test_optimizer_given_by_name(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("rmsprop")
    model.optimizer.learning_rate = 0.25
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    tx, state = dialect.import_state(tmp_path / "model.keras", flat, names_of(model))
    assert state.count == 0
    params = handover.fields(state.inner_state)["nu"]
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.25 / np.sqrt(0.1 + 1e-7), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back(tmp_path, dtype):
    layer = keras.layers.Dense(2, dtype=dtype)
    model = keras.Sequential([keras.Input((3,), dtype=dtype), layer])
    model.compile(keras.optimizers.RMSprop(momentum=0.9, centered=True))
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    for v in model.optimizer.variables[2:]:
        v.assign(rng.uniform(0.5, 1, v.shape))
    model.save(tmp_path / "model.keras")
    names = names_of(model)
    for source in (model.optimizer, tmp_path / "model.keras"):
        _, state = dialect.import_state(source, flat, names)
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
        exported = dialect.export_state(state, back_to(names), names, like=source)
        again = dialect.import_state(
            exported, flat, names, config=model.optimizer.get_config()
        )
        assert_same(again[1], state)
        for array, v in zip(exported.values(), model.optimizer.variables, strict=True):
            assert array.dtype.name == v.dtype


def rewritten(path, change):
    """A copy of a .keras file, after ``change`` to its configuration and variables."""
    copy = path.with_name("damaged.keras")
    with zipfile.ZipFile(path) as archive:
        model = json.loads(archive.read("config.json"))
        weights = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(weights, "a") as file:
        change(model["compile_config"]["optimizer"], file["optimizer/vars"])
    with zipfile.ZipFile(copy, "w") as archive:
        archive.writestr("config.json", json.dumps(model))
        archive.writestr("model.weights.h5", weights.getvalue())
    return copy


def put(key, value):
    """Replace a variable."""

    def change(optimizer, variables):
        del variables[key], optimizer
        variables[key] = value

    return change


def put_config(**entries):
    return lambda optimizer, variables: optimizer["config"].update(entries)


def put_rate(**entries):
    def change(optimizer, variables):
        optimizer["config"]["learning_rate"].update(entries)

    return change


def renumber(optimizer, variables):
    variables["99"] = variables["3"][()]
    del variables["3"]


def remove(*keys):
    def change(optimizer, variables):
        for key in keys:
            del variables[key]

    return change


# The variables: 0 iteration, 1-4 average, 5-8 gradient_accumulator, 9-12 velocity,
# 13-16 momentum, 17-20 average_gradient; of each four, the first is a kernel (3, 2).
DAMAGE = {
    "negative_iteration": (put("0", np.int32(-1)), "iteration must be a finite"),
    "fractional_iteration": (put("0", 2.5), "iteration must be a whole number"),
    "nan": (
        put("9", np.full((3, 2), np.nan, "f")),
        "dense/kernel_velocity must be fin",
    ),
    "negative_velocity": (put("9", -np.ones((3, 2), "f")), "must not be negative"),
    "shape": (put("13", np.ones((2, 3), "f")), "dense/kernel_momentum must be float32"),
    "integers": (put("17", np.ones((3, 2), int)), "average_gradient must be floating"),
    "complex": (put("9", np.ones((3, 2), "D")), "kernel_velocity must be float32"),
    "float64": (put("9", np.ones((3, 2), "d")), "velocity must be float32[3, 2], got "),
    "text": (put("9", "no array"), "kernel_velocity must be an array"),
    "swapped": (
        lambda o, variables: (
            variables.move("9", "x")
            or variables.move("10", "9")
            or variables.move("x", "10")
        ),
        "dense/bias_velocity must be float32[2], got float32[3, 2]",
    ),
    "missing": (remove("20"), "there are 20 variables, but 21 belong"),
    "left_over": (
        lambda o, v: v.create_dataset("21", data=1.0),
        "there are 22 variables",
    ),
    "renumbered": (renumber, "must be numbered from 0"),
    "empty": (lambda o, variables: variables.clear(), "holds no optimizer"),
    "other_class": (lambda o, v: o.update(class_name="Adam"), "RMSprop, got Adam"),
    "other_name": (lambda o, v: o.update(config="adam"), "config must be what"),
    "unknown_key": (put_config(nesterov=True), "unknown keys ['nesterov']"),
    "missing_key": (lambda o, v: o["config"].pop("rho"), "lacks ['rho']"),
    "nan_rho": (put_config(rho=float("nan")), "rho must be a finite number"),
    "negative_epsilon": (put_config(epsilon=-1e-7), "epsilon must be a finite number"),
    "momentum_as_text": (put_config(momentum="0.9"), "momentum must be a number"),
    "centered_as_number": (put_config(centered=1), "centered must be True or False"),
    "two_clippings": (put_config(clipnorm=1.0, clipvalue=1.0), "only one kind of clip"),
    "scaled_loss": (
        put_config(loss_scale_factor=2.0),
        "loss_scale_factor must be None",
    ),
    "negative_decay": (put_config(weight_decay=-1.0), "weight_decay must be a finite"),
    "ema_momentum": (put_config(ema_momentum=1.5), "ema_momentum must be a finite"),
    "accumulation": (put_config(gradient_accumulation_steps=1), "must be None or at l"),
    "rate_is_constant": (
        put_config(learning_rate=0.1),
        "22 belong to the configuration",
    ),
    "own_schedule": (put_rate(module="mine"), "learning_rate must be a number or one"),
    "schedule_name": (
        put_rate(class_name="Decay"),
        "learning_rate must be a number or",
    ),
    "schedule_nan": (
        put_rate(config={"decay_rate": np.nan}),
        "ExponentialDecay: decay_r",
    ),
    "schedule_lacks": (put_rate(config={}), "ExponentialDecay: "),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(saved, change, message):
    model, folder = saved
    path = rewritten(folder / "model.keras", change)
    with pytest.raises(ValueError, match=re.escape(message)):
        dialect.import_state(path, flat, names_of(model))


def cut(path, share):
    copy = path.with_name(f"cut-{path.name}")
    copy.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return copy


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_truncated_files(saved, name, share):
    model, folder = saved
    path = cut(folder / name, share)
    with pytest.raises(
        ValueError, match=f"{path.name} is damaged, or no file of Keras"
    ):
        dialect.import_state(path, flat, names_of(model), config={})


def test_every_problem_is_named(saved):
    """What is wrong with the arrays is reported at once, and nothing is half loaded."""
    model, folder = saved

    def change(optimizer, variables):
        put("0", np.int32(-1))(optimizer, variables)
        put("9", np.full((3, 2), np.inf, "f"))(optimizer, variables)
        put("14", np.ones(3, "f"))(optimizer, variables)

    path = rewritten(folder / "model.keras", change)
    with pytest.raises(ValueError, match="iteration") as raised:
        dialect.import_state(path, flat, names_of(model))
    assert str(raised.value).count("\n- ") == 3


def test_other_objects_of_keras(saved):
    model, _ = saved
    adam = keras.optimizers.Adam()
    with pytest.raises(ValueError, match="must be an RMSprop, got Adam"):
        dialect.import_state(adam, flat)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop())
    with pytest.raises(ValueError, match="inner_optimizer"):
        dialect.import_state(scaled, flat)
    with pytest.raises(ValueError, match=r"model\.optimizer"):
        dialect.import_state(model, flat)
    with pytest.raises(ValueError, match="Is the optimizer built"):
        dialect.import_state(keras.optimizers.RMSprop(), flat, names_of(model))
    with pytest.raises(FileNotFoundError):
        dialect.import_state("no such file.keras", flat, names_of(model))
