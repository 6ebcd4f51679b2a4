# SPDX-License-Identifier: Apache-2.0
"""Bad input, and what the error says: the name, what came, what is allowed."""

import functools
import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_rms import rmsprop, scale_by_rms
from optax_rms._checks import check_number, is_zero


def build(name, value, **options):
    """The optimizer, and where it takes the argument also the transformation."""
    if name not in ("learning_rate", "momentum", "nesterov", "lr_in_momentum"):
        scale_by_rms(**{name: value}, **options)
    rmsprop(**{"learning_rate": 0.1, name: value}, **options)


RANGES = {
    "learning_rate": "[0, inf)",
    "decay": "[0, 1]",
    "eps": "[0, inf)",
    "initial_scale": "[0, inf)",
    "momentum": "[0, 1]",
}
SCALARS = tuple(RANGES)
OUT_OF_RANGE = [np.nan, np.inf, -np.inf, -1e-9, -1, np.float32(-0.5), np.array(-2.0)]


@pytest.mark.parametrize("value", OUT_OF_RANGE, ids=repr)
@pytest.mark.parametrize("name", SCALARS)
def test_number_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a finite number") as error:
        build(name, value)
    assert RANGES[name] in str(error.value)
    shown = value.item() if isinstance(value, np.ndarray) else value
    assert f"got {shown!r}." in str(error.value)


@pytest.mark.parametrize("value", [1.0 + 1e-9, 2, np.float32(1.5)], ids=repr)
@pytest.mark.parametrize("name", ["decay", "momentum"])
def test_number_above_one(name, value):
    expected = f"{name} must be a finite number in [0, 1], got {value!r}."
    with pytest.raises(ValueError, match=re.escape(expected)):
        build(name, value)


def test_decay_of_one_has_no_bias_correction():
    expected = "decay must be a finite number in [0, 1), got 1.0."
    with pytest.raises(ValueError, match=re.escape(expected)):
        build("decay", 1.0, bias_correction=True)


def test_negative_learning_rate_says_what_to_do():
    with pytest.raises(ValueError, match="negate the gradients"):
        rmsprop(-0.1)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.array(1.0)], ids=repr)
@pytest.mark.parametrize("name", SCALARS)
def test_ends_of_the_range_are_allowed(name, value):
    build(name, value)


@pytest.mark.parametrize(
    "value",
    [True, np.True_, np.array(True), "0.9", 1j, object()],
    ids=["bool", "np.bool", "bool array", "str", "complex", "object"],
)
@pytest.mark.parametrize("name", SCALARS)
def test_arguments_that_are_not_numbers_are_named(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a number or a scalar") as e:
        build(name, value)
    shown = value.item() if isinstance(value, np.ndarray) else value
    assert repr(shown) in str(e.value)
    assert f"of type {type(shown).__name__}" in str(e.value)


@pytest.mark.parametrize("name", [n for n in SCALARS if n != "momentum"])
def test_none_is_not_a_number(name):
    with pytest.raises(TypeError, match=f"^{name} must be .* got None of type NoneTy"):
        build(name, None)


@pytest.mark.parametrize(
    "value", [np.ones(2), jnp.ones(2), [0.5, 0.5], np.ones((1, 1))], ids=repr
)
@pytest.mark.parametrize("name", SCALARS)
def test_arrays_in_place_of_a_number_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a number or a scalar") as e:
        build(name, value)
    assert str(np.shape(value)) in str(e.value)
    assert "jax.vmap" in str(e.value)


@pytest.mark.parametrize("value", [-1.0, jnp.nan, 2.0, 1])
def test_values_of_jax_arrays_are_not_looked_at(value):
    """They may be traced, and a check must not depend on whether they are."""
    for name in SCALARS:
        build(name, jnp.array(value))
        jax.jit(lambda x, name=name: build(name, x))(value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["decay", "momentum"])
def test_weights_of_the_past_are_not_taken_in_half_precision(name, dtype):
    """In bfloat16 a decay of 0.999 is 1, and no gradient would count."""
    params = jnp.ones(3, dtype)
    options = {"learning_rate": 1e-3, name: 0.999}
    with pytest.raises(TypeError, match=rf"decay .*{dtype}.*hyperparam_dtype"):
        optax.inject_hyperparams(rmsprop)(**options).init(params)
    with pytest.raises(TypeError, match=f"{name} must have at least 32 bits"):
        build(name, jnp.asarray(0.5, dtype))
    tx = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(**options)
    updates, _ = tx.update(params, tx.init(params), params)
    expected, _ = rmsprop(**options).update(params, rmsprop(**options).init(params))
    np.testing.assert_array_equal(updates, expected)


@pytest.mark.parametrize("name", ["eps", "learning_rate", "initial_scale"])
def test_numbers_are_not_taken_in_float16(name):
    """In float16 an eps of 1e-8 is 0, and tiny gradients would take full steps."""
    params = jnp.ones(3, jnp.float16)
    inject = functools.partial(optax.inject_hyperparams, static_args=("decay",))
    options = {"learning_rate": 1e-3, name: 1e-8}
    with pytest.raises(TypeError, match=r"must have at least 32 bits, got float16, in"):
        inject(rmsprop)(**options).init(params)
    with pytest.raises(TypeError, match=f"^{name} must have at least 32 bits"):
        build(name, jnp.float16(1e-3))
    build(name, jnp.bfloat16(1e-8))  # 0.4 % off, but not 0.
    tx = inject(rmsprop, hyperparam_dtype=jnp.float32)(**options)
    updates, _ = tx.update(params, tx.init(params), params)
    expected, _ = rmsprop(**options).update(params, rmsprop(**options).init(params))
    np.testing.assert_array_equal(updates, expected)


@pytest.mark.parametrize(
    ("options", "inside", "outside", "shown"),
    [
        ({}, [0.0, 1.0], [-0.1, 1.1], "[0, 1]"),
        ({"exclude_low": True}, [1e-9, 1.0], [0.0], "(0, 1]"),
        ({"exclude_high": True}, [0.0, 0.9], [1.0], "[0, 1)"),
        ({"exclude_low": True, "exclude_high": True}, [0.5], [0.0, 1.0], "(0, 1)"),
    ],
)
def test_open_and_closed_ranges(options, inside, outside, shown):
    for value in inside:
        assert check_number("x", value, 0, 1, **options) == value
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(shown)):
            check_number("x", value, 0, 1, **options)


FLAGS = ("eps_in_sqrt", "bias_correction", "centered", "nesterov", "lr_in_momentum")


@pytest.mark.parametrize("value", [1, 0.0, None, "yes", jnp.array(True)], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_flags_must_be_booleans(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got") as e:
        build(name, value)
    assert repr(value) in str(e.value)
    assert type(value).__name__ in str(e.value)


@pytest.mark.parametrize("name", FLAGS)
def test_flags_cannot_be_traced(name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False.*be traced"):
        jax.jit(lambda x: build(name, x))(True)


@pytest.mark.parametrize("name", FLAGS)
def test_numpy_flags_are_flags(name):
    build(name, np.True_)


def test_nesterov_is_checked_without_momentum():
    with pytest.raises(TypeError, match="nesterov"):
        rmsprop(0.1, momentum=None, nesterov=1)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("float99", TypeError, "floating dtype or None, got 'float99'"),
        (3, TypeError, "floating dtype or None, got 3"),
        ("int8", ValueError, "real floating dtype such as jnp.float32, got int8"),
        (jnp.complex64, ValueError, "real floating dtype .*, got complex64"),
        (bool, ValueError, "real floating dtype .*, got bool"),
        ("float64", ValueError, "accumulator_dtype=float64 needs .*jax_enable_x64"),
    ],
)
def test_accumulator_dtype(value, error, message):
    with pytest.raises(error, match=f"accumulator_dtype.*{message}|^{message}"):
        build("accumulator_dtype", value)


@pytest.mark.parametrize("value", ["bfloat16", jnp.float16, np.float32, np.dtype("f4")])
def test_accumulator_dtypes_of_every_spelling(value):
    build("accumulator_dtype", value)


TRANSFORMATIONS = [
    pytest.param(scale_by_rms(), id="scale_by_rms"),
    pytest.param(scale_by_rms(centered=True), id="centered"),
    pytest.param(rmsprop(0.1, momentum=0.9), id="rmsprop"),
]


@pytest.mark.parametrize("tx", TRANSFORMATIONS)
def test_all_integer_gradients_are_named(tx):
    good = {"w": jnp.ones(2), "layers": [1.0, {"b": jnp.ones(3)}], "n": jnp.ones(())}
    bad = {"w": jnp.ones(2), "layers": [3, {"b": jnp.ones(3, bool)}], "n": np.arange(2)}
    listed = re.escape(
        "['layers'][0] (int32), ['layers'][1]['b'] (bool), ['n'] (int32). "
    )
    for params in (good, bad):
        state = tx.init(params)
        with pytest.raises(TypeError, match=f"^gradients must be.*{listed}") as error:
            tx.update(bad, state)
        assert "eqx.is_inexact_array" in str(error.value)
        assert "wrt=nnx.Param" in str(error.value)


@pytest.mark.parametrize(
    "leaf", [jnp.arange(2), np.ones(3, bool), 3, True, jax.random.key(0)], ids=str
)
@pytest.mark.parametrize("tx", TRANSFORMATIONS)
def test_a_leaf_without_gradient_has_no_state(tx, leaf):
    """As with Optax, for which ``eqx.filter(model, eqx.is_array)`` trains."""
    params = {"w": jnp.ones(2), "n": leaf}
    gradients = {"w": jnp.full(2, 3.0), "n": None}
    alone = tx.init({"w": params["w"]})
    state = jax.jit(tx.init)(params) if isinstance(leaf, jax.Array) else tx.init(params)
    chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(alone))
    for _ in range(2):
        updates, state = tx.update(gradients, state, params)
        expected, alone = tx.update({"w": gradients["w"]}, alone)
        assert updates["n"] is None
        chex.assert_trees_all_equal(updates["w"], expected["w"])
    chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(alone))
    with pytest.raises(ValueError, match=r"\['n'\] has shape .* state \[None"):
        tx.update({"w": params["w"], "n": jnp.ones(jnp.shape(leaf))}, state)


def test_only_leaf_and_leaves_that_jax_alone_knows():
    with pytest.raises(TypeError, match=r"the only leaf \(int32\)"):
        scale_by_rms().update(jnp.arange(2), scale_by_rms().init(jnp.arange(2)))
    # The gradient of an integer.
    float0 = np.zeros(2, jax.dtypes.float0)
    state = scale_by_rms().init({"w": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"\['w'\].*float0"):
        scale_by_rms().update({"w": float0}, state)


def test_leaves_that_are_no_arrays_are_named():
    """As in an Equinox model that was not filtered, whose activation is a leaf."""
    model = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"parameters must be.*activation"):
        scale_by_rms().init(model)
    with pytest.raises(TypeError, match=r"parameters must be.*\['name'\] \(str\)"):
        scale_by_rms().init({"name": "x", "w": jnp.ones(2)})


@pytest.mark.parametrize("tx", TRANSFORMATIONS)
def test_all_wrong_shapes_are_named(tx):
    state = tx.init({"a": jnp.ones(2), "b": [jnp.ones((2, 3)), 1.0], "c": None})
    wrong = {"a": jnp.ones(3), "b": [jnp.ones((3, 2)), 1.0], "c": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"^gradients must have the shapes of") as e:
        tx.update(wrong, state)
    message = str(e.value)
    assert "['a'] has shape (3,), its state [(2,)" in message
    assert "['b'][0] has shape (3, 2), its state [(2, 3)" in message
    assert "['c'] has shape (2,), its state [None" in message
    assert "['b'][1]" not in message


def test_shapes_that_would_broadcast_are_wrong():
    for shape in [(), (1,), (1, 2)]:
        with pytest.raises(ValueError, match="gradients must have the shapes"):
            scale_by_rms().update(jnp.ones(shape), scale_by_rms().init(jnp.ones(2)))


def test_masked_parameter_with_a_gradient():
    state = scale_by_rms().init({"a": optax.MaskedNode()})
    with pytest.raises(ValueError, match=r"\['a'\] has shape \(2,\), its state \[Mask"):
        scale_by_rms().update({"a": jnp.ones(2)}, state)


@pytest.mark.parametrize(
    ("tx", "other", "expected", "received"),
    [
        (scale_by_rms(), optax.adam(1.0), "ScaleByRmsState", "tuple"),
        (scale_by_rms(), optax.scale_by_adam(), "ScaleByRmsState", "ScaleByAdamState"),
        (
            scale_by_rms(),
            scale_by_rms(bias_correction=True),
            "ScaleByRmsState",
            "ScaleByRmsWithCountState",
        ),
        (
            scale_by_rms(centered=True),
            optax.scale_by_stddev(),
            "ScaleByStddevState",
            "ScaleByRStdDevState",
        ),
        (
            rmsprop(0.1),
            rmsprop(0.1, momentum=0.9),
            "ScaleByRmsState, EmptyState, EmptyState",
            "ScaleByRmsState, EmptyState, TraceState",
        ),
        (
            rmsprop(0.1),
            scale_by_rms(),
            "ScaleByRmsState, EmptyState",
            "ScaleByRmsState",
        ),
    ],
)
def test_state_of_another_transformation(tx, other, expected, received):
    p = jnp.ones(2)
    message = rf"init returns, \({expected}.*got \(?{received}\)?\. .*dialects"
    with pytest.raises(TypeError, match=message):
        tx.update(p, other.init(p))


def schedule(count):
    del count
    return 0.1


CONFIGURATIONS = {
    "plain": rmsprop(0.1),
    "momentum": rmsprop(0.1, momentum=0.9),
    "momentum outside": rmsprop(0.1, momentum=0.9, lr_in_momentum=False),
    "schedule": rmsprop(schedule),
    "centered": rmsprop(0.1, centered=True),
    "nothing": optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s)),
}


@pytest.mark.parametrize("other", CONFIGURATIONS)
@pytest.mark.parametrize("own", ["plain", "momentum", "schedule"])
def test_state_of_another_configuration(own, other):
    """A momentum buffer or a step count would otherwise be lost without a word."""
    p = jnp.ones(2)
    tx, state = CONFIGURATIONS[own], CONFIGURATIONS[other].init(p)
    if own == other:
        tx.update(p, state)
        return
    with pytest.raises(TypeError, match="with other options"):
        tx.update(p, state)


@pytest.mark.parametrize("own", ["plain", "momentum"])
def test_a_list_is_no_state(own):
    """`jax.lax.scan` would fail later, as a tuple comes back."""
    tx = CONFIGURATIONS[own]
    with pytest.raises(TypeError, match=r"got a list, \(Scale.*adapt_state"):
        tx.update(jnp.ones(2), list(tx.init(jnp.ones(2))))


def test_only_a_number_is_known_to_be_zero():
    assert is_zero(check_number("momentum", 0))
    assert is_zero(check_number("momentum", np.float32(0)))
    assert not is_zero(check_number("momentum", 1e-9))
    assert not is_zero(check_number("momentum", jnp.float32(0)))
