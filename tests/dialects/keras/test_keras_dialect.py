# SPDX-License-Identifier: Apache-2.0
"""The Keras dialect, without Keras."""

import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import assert_same_bits
from helpers.on_request import first_by_default

from optax_rms.dialects import keras


def params_and_gradients(dtype=jnp.float32):
    params = {"a": jnp.array([1.0, -2.0], dtype), "b": jnp.full((2, 2), 3.0, dtype)}
    return params, jax.tree.map(lambda p: p / 4, params)


BAD_ARGUMENTS = {
    "learning_rate": ({"learning_rate": -1.0}, ValueError, "learning_rate must be a"),
    "rate_text": (
        {"learning_rate": "fast"},
        TypeError,
        "learning_rate must be a number",
    ),
    "no_count": ({"learning_rate": lambda: 0.1}, TypeError, "a function of the step"),
    "rho": ({"rho": 1.5}, ValueError, "rho must be a finite number in [0, 1], got 1.5"),
    "momentum": ({"momentum": -0.1}, ValueError, "momentum must be a finite number"),
    "epsilon": ({"epsilon": np.nan}, ValueError, "epsilon must be a finite number"),
    "centered": ({"centered": 1}, TypeError, "centered must be True or False"),
    "weight_decay": ({"weight_decay": -1}, ValueError, "weight_decay must be a finite"),
    "clipnorm": ({"clipnorm": 0}, ValueError, "For no clipping, pass None."),
    "clipvalue": ({"clipvalue": -1.0}, ValueError, "clipvalue must be a finite number"),
    "global_clipnorm": (
        {"global_clipnorm": 0.0},
        ValueError,
        "global_clipnorm must be",
    ),
    "two": (
        {"clipnorm": 1.0, "clipvalue": 1.0},
        ValueError,
        "['clipnorm', 'clipvalue']",
    ),
    "use_ema": ({"use_ema": None}, TypeError, "use_ema must be True or False"),
    "ema_momentum": ({"ema_momentum": 2}, ValueError, "ema_momentum must be a finite"),
    "frequency": (
        {"ema_overwrite_frequency": 0},
        ValueError,
        "frequency must be None or",
    ),
    "fraction": ({"ema_overwrite_frequency": 2.0}, TypeError, "name it in static_args"),
    "calls": (
        {"gradient_accumulation_steps": 1},
        ValueError,
        "steps must be None or at",
    ),
    "loss_scale": (
        {"loss_scale_factor": 2.0},
        ValueError,
        "Divide the gradients by it",
    ),
    "name": ({"name": "rmsprop"}, ValueError, "optax.named_chain"),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        keras.rmsprop(**arguments)


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"use_ema": True}])
def test_parameters_are_needed(options):
    params, gradients = params_and_gradients()
    tx = keras.rmsprop(**options)
    with pytest.raises(ValueError, match="update needs the parameters"):
        tx.update(gradients, tx.init(params))


def test_bad_trees_are_reported():
    params, gradients = params_and_gradients()
    tx = keras.rmsprop(gradient_accumulation_steps=2)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"\['a'\] has shape \(1,\)"):
        tx.update({**gradients, "a": jnp.ones(1)}, state)
    with pytest.raises(TypeError, match=r"\['a'\] \(int32\)"):
        tx.update({**gradients, "a": jnp.array([1, 2])}, state)
    with pytest.raises(TypeError, match=r"keras\.rmsprop needs the RMSpropState"):
        tx.update(gradients, optax.rmsprop(0.1).init(params))


def test_integer_leaves_have_no_state():
    """As those of eqx.filter(model, eqx.is_array): their gradients are ``None``."""
    params, gradients = params_and_gradients()
    tx = keras.rmsprop(**EVERYTHING)
    more = {"flag": jnp.array(True), "steps": jnp.arange(3)}
    state, expected_state = tx.init(params | more), tx.init(params)
    none = dict.fromkeys(more)
    assert state.average["steps"] is None
    assert state.accumulated["flag"] is None
    for _ in range(4):
        updates, state = tx.update(gradients | none, state, params | more)
        expected, expected_state = tx.update(gradients, expected_state, params)
        chex.assert_trees_all_equal(updates, expected | none)
    chex.assert_trees_all_equal(state.average, expected_state.average | none)
    with pytest.raises(ValueError, match=r"\['steps'\] has shape \(3,\)"):
        tx.update(gradients | none | {"steps": jnp.ones(3)}, state, params | more)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_abstract_parameters(dtype):
    """An average of abstract parameters is abstract as well."""
    params, _ = params_and_gradients(dtype)
    tx = keras.rmsprop(**EVERYTHING)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    expected = jax.eval_shape(tx.init, params)
    for state in (tx.init(abstract), jax.eval_shape(tx.init, abstract)):
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    leaf = jax.ShapeDtypeStruct((8,), dtype, sharding=sharding)
    assert tx.init(leaf).average.sharding == sharding


EVERYTHING = {
    "momentum": 0.9,
    "weight_decay": 0.1,
    "clipnorm": 1.0,
    "use_ema": True,
    "ema_overwrite_frequency": 2,
    "gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    """The update has the dtype of the gradient; the state does not lose precision."""
    params, gradients = params_and_gradients(dtype)
    tx = keras.rmsprop(**EVERYTHING)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(4):
        updates, state = step(gradients, state, params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
    chex.assert_trees_all_equal_structs(state, tx.init(params))


def test_gradients_that_are_small_in_half_precision():
    """The squares of these underflow in float16, and so do Keras' eps and the norm."""
    params = {"a": jnp.zeros(3, jnp.float16)}
    gradients = {"a": jnp.array([0.0, 1e-5, 1e-6], jnp.float16)}
    tx = keras.rmsprop(clipnorm=1e-6)
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert np.isfinite(updates["a"]).all()
    assert updates["a"][0] == 0
    assert updates["a"][1] < updates["a"][2] < 0


@pytest.mark.parametrize("option", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_derivatives_are_finite_where_a_norm_is_zero(option):
    tx = keras.rmsprop(0.1, **{option: 1.0})

    def update(g):
        return tx.update(g, tx.init(g))[0]

    slopes = jax.jacrev(update)(jnp.zeros(3))
    # One step of 0.1 from an epsilon of 1e-7.
    np.testing.assert_allclose(slopes, -0.1 / np.sqrt(1e-7) * np.eye(3), rtol=1e-6)


def test_average_can_be_read_within_a_chain():
    params, gradients = params_and_gradients()
    tx = optax.chain(optax.clip(1.0), keras.rmsprop(use_ema=True))
    state = tx.init(params)
    np.testing.assert_array_equal(optax.tree.get(state, "average")["a"], params["a"])
    updates, state = tx.update(gradients, state, params)
    average = optax.tree.get(state, "average")
    np.testing.assert_array_equal(
        average["a"], optax.apply_updates(params, updates)["a"]
    )


def test_average_is_a_copy():
    """Parameters and state can both be donated."""
    params, gradients = params_and_gradients()
    tx = keras.rmsprop(use_ema=True)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step_donating = jax.jit(step, donate_argnums=(0, 1))
    expected = step(params, state)
    actual = step_donating(params, state)
    assert_same_bits(actual, expected)


def test_gradients_may_be_python_numbers():
    for options in (
        {},
        {"clipnorm": 0.5},
        {"clipvalue": 0.5},
        {"weight_decay": 0.1},
        {"use_ema": True},
    ):
        tx = keras.rmsprop(0.1, **options)
        numbers, arrays = {"w": 1.0}, {"w": jnp.array(1.0)}
        expected, _ = tx.update(arrays, tx.init(arrays), arrays)
        assert tx.update(numbers, tx.init(numbers), numbers)[0] == expected


@pytest.mark.parametrize(
    ("options", "expected_moves"),
    # With an average, parameters move at each step and, overwritten, at half the calls.
    first_by_default([({"use_ema": True, "ema_overwrite_frequency": 2}, 8), ({}, 4)]),
)
def test_steps_are_counted_on_beyond_the_largest_count(options, expected_moves):
    tx = keras.rmsprop(0.1, gradient_accumulation_steps=3, **options)
    params = jnp.array([1.0])
    last = jnp.iinfo(jnp.int32).max
    counts = (last - 6, last)
    states = [tx.init(params)._replace(count=jnp.int32(c)) for c in counts]
    moves = 0
    for _ in range(13):
        (expected, states[0]), (updates, states[1]) = (
            tx.update(params, state, params) for state in states
        )
        np.testing.assert_array_equal(updates, expected)
        moves += bool(updates != 0)
    assert moves == expected_moves


def test_accumulation_on_an_explicit_mesh():
    # Its name until JAX 0.7.
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        params = jax.device_put(jnp.ones(8), sharding)
        tx = keras.rmsprop(0.1, gradient_accumulation_steps=2)
        state = tx.init(params)
        for expected in (0, -0.1 / np.sqrt(0.1)):
            updates, state = tx.update(params, state)
            np.testing.assert_allclose(updates, np.full(8, expected), rtol=1e-6)
            assert updates.sharding == sharding


def test_hyperparameters_can_be_traced():
    params, gradients = params_and_gradients()
    options = {"momentum": 0.5, "weight_decay": 0.1, "global_clipnorm": 0.5}
    options |= {"use_ema": True, "ema_momentum": 0.5, "rho": 0.5, "epsilon": 1e-3}

    def two_steps(make):
        tx = make(learning_rate=0.1, **options)
        state, p = tx.init(params), params
        for _ in range(2):
            updates, state = tx.update(gradients, state, p)
            p = optax.apply_updates(p, updates)
        return p

    injected = two_steps(optax.inject_hyperparams(keras.rmsprop))
    expected = two_steps(keras.rmsprop)
    for a, b in zip(*map(jax.tree.leaves, (injected, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)

    def first_update(rate, clip):
        tx = keras.rmsprop(rate, clipnorm=clip, weight_decay=rate)
        return tx.update(gradients, tx.init(params), params)[0]

    rates, clips = jnp.array([0.1, 0.2]), jnp.array([0.1, 10.0])
    many = jax.vmap(first_update)(rates, clips)
    for i in range(2):
        one = first_update(float(rates[i]), float(clips[i]))
        for a, b in zip(*map(jax.tree.leaves, (many, one)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


def test_trees_of_all_kinds():
    params = {"x": jnp.ones(2), "none": None, "empty": jnp.ones((0, 3)), "t": (1.5,)}
    params = jax.tree.map(jnp.asarray, params)
    gradients = jax.tree.map(jnp.ones_like, params)
    tx = keras.rmsprop(**EVERYTHING)
    updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    chex.assert_trees_all_equal_structs(updates, params)
    tx.update({}, tx.init({}), {})
    masked = optax.masked(tx, {"x": True, "none": None, "empty": False, "t": (False,)})
    updates, _ = masked.update(gradients, masked.init(params), params)
    np.testing.assert_array_equal(updates["t"][0], 1.0)
    optax.tree.map_params(tx, jnp.zeros_like, state)


# Taking over, from an object that looks like an optimizer of Keras.


class Variable:
    def __init__(self, name, value):
        self.name, self.value = name, value
        self.path = f"rmsprop/{name}"
        self.dtype, self.shape = str(value.dtype), value.shape


CONFIG = {
    "name": "rmsprop",
    "learning_rate": 0.1,
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
    "rho": 0.9,
    "momentum": 0.5,
    "epsilon": 1e-7,
    "centered": False,
}


SLOTS = [f"net_{n}_{s}" for s in ("velocity", "momentum") for n in ("kernel", "bias")]
NO_SLOTS = dict.fromkeys(SLOTS)


class RMSprop:
    """Looks like Keras' optimizer of a kernel and a bias."""

    def __init__(self, config=CONFIG, **arrays):
        kernel = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
        bias = np.array([1, 2, 3], np.float32)
        arrays = {
            "iteration": np.array(7, np.int32),
            "learning_rate": np.array(0.25, np.float32),
            "net_kernel_velocity": kernel,
            "net_bias_velocity": bias,
            "net_kernel_momentum": -kernel,
            "net_bias_momentum": -bias,
        } | arrays
        self.config = config
        self.variables = [Variable(k, v) for k, v in arrays.items() if v is not None]

    def get_config(self):
        return self.config


NAMES = ["net/kernel", "net/bias"]


def convert(arrays):
    return {
        "w": jnp.asarray(arrays["net/kernel"]).T,
        "b": jnp.asarray(arrays["net/bias"]),
    }


def convert_back(params):
    return {"net/kernel": params["w"].T, "net/bias": params["b"]}


def test_import_and_export():
    optimizer = RMSprop()
    tx, state = keras.import_state(optimizer, convert, NAMES)
    assert state.count == 7
    kernel = optimizer.variables[2].value
    np.testing.assert_array_equal(optax.tree.get(state, "nu")["w"], kernel.T)
    np.testing.assert_array_equal(optax.tree.get(state, "trace")["w"], kernel.T)
    # The mean square stays the same; the rate is that of the variable.
    updates, state = tx.update(jax.tree.map(jnp.sqrt, state.inner_state[0].nu), state)
    np.testing.assert_allclose(updates["w"], kernel.T / 2 - 0.25, rtol=1e-6)
    exported = keras.export_state(state, convert_back, NAMES, like=optimizer)
    assert list(exported) == ["0", "1", "2", "3", "4", "5"]
    assert (exported["0"], exported["1"]) == (8, 0.25)
    np.testing.assert_allclose(exported["2"], kernel, rtol=1e-6)
    np.testing.assert_array_equal(exported["4"], -updates["w"].T)
    assert exported["0"].dtype == np.int32


def test_round_trip_is_the_identity():
    """Also where a mean square much larger than the variance hides it."""
    rng = np.random.default_rng(0)
    shape = (100, 100)
    mean = np.float32(rng.normal(size=shape) * 10.0 ** rng.integers(-6, 6, shape))
    spread = rng.random(shape) * 10.0 ** rng.integers(-12, 3, shape)
    velocity = np.float32(np.float64(mean) ** 2 + spread)
    # No variance explains the first.
    velocity[0, 0], mean[0, 0] = 2, 2
    slots = {"velocity": velocity, "average_gradient": mean}
    config = CONFIG | {"centered": True, "momentum": 0.0}
    optimizer = RMSprop(
        config, **NO_SLOTS | {f"net_kernel_{s}": x for s, x in slots.items()}
    )
    names = ["kernel"]
    _, state = keras.import_state(optimizer, dict, names)
    exported = keras.export_state(state, dict, names, like=optimizer)
    _, again = keras.import_state(exported, dict, names, config=config)
    assert_same_bits(again, state)
    assert again.inner_state[0].variance["kernel"][0, 0] == 0
    assert (again.inner_state[0].variance["kernel"] > 0).sum() > 5000


def test_names_of_the_optimizer():
    seen = []

    def note(arrays):
        seen.append(list(arrays))
        return dict(arrays)

    keras.import_state(RMSprop(), note)
    assert set(map(tuple, seen)) == {("net_kernel", "net_bias")}


def test_schedule_without_a_configuration():
    """A schedule of the user, of which Keras has no configuration."""

    def get_config():
        raise NotImplementedError("override get_config")

    optimizer = RMSprop(learning_rate=None)
    vars(optimizer).update(CONFIG, get_config=get_config)
    with pytest.raises(ValueError, match="Pass learning_rate yourself"):
        keras.import_state(optimizer, convert, NAMES)
    _, state = keras.import_state(optimizer, convert, NAMES, learning_rate=0.1)
    exported = keras.export_state(state, convert_back, NAMES, like=optimizer)
    for i, v in enumerate(optimizer.variables):
        np.testing.assert_array_equal(exported[str(i)], v.value)


def test_another_learning_rate():
    """A schedule continues with the count of Keras."""
    rates = jnp.array([0.0] * 7 + [2.0])
    optimizer = RMSprop(CONFIG | {"momentum": 0.0}, **dict.fromkeys(SLOTS[2:]))
    _, plain = keras.import_state(optimizer, convert, NAMES)
    gradients = jax.tree.map(jnp.sqrt, plain.inner_state[0].nu)
    for rate in (2.0, lambda count: rates[count]):
        tx, state = keras.import_state(optimizer, convert, NAMES, learning_rate=rate)
        updates, _ = tx.update(gradients, state)
        np.testing.assert_allclose(updates["w"], -2.0, rtol=1e-6)


ONES = np.ones((2, 3), np.float32)

DAMAGE = {
    "renamed": ({SLOTS[2]: None, "net_kernel_m": ONES}, "variable 4 must be 'net_kern"),
    "reordered": (
        {"net_bias_momentum": None, "iteration": None, "x": np.array(1)},
        "variable 0 must be 'iteration', got 'learning_rate'",
    ),
    "missing": ({"net_bias_momentum": None}, "there are 5 variables, but 6 belong to"),
    "left_over": ({"net_x_momentum": ONES}, "there are 7 variables, but 6 belong to"),
    "shape": (
        {SLOTS[2]: ONES.T},
        "net/kernel_momentum must be float32[2, 3], got float",
    ),
    "dtype": (
        {SLOTS[2]: ONES.astype("d")},
        "net/kernel_momentum must be float32[2, 3]",
    ),
    "integers": ({SLOTS[0]: ONES.astype(int)}, "velocity must be floating-point"),
    "nan": (
        {SLOTS[3]: np.full(3, np.nan, "f")},
        "net/bias_momentum must be finite, got 3",
    ),
    "negative": ({SLOTS[0]: -ONES}, "net/kernel_velocity must not be negative, got 6"),
    "nan_rate": ({"learning_rate": np.array(np.nan)}, "learning_rate must be a finite"),
    "rates": (
        {"learning_rate": np.ones(2)},
        "learning_rate must be a number, got shape",
    ),
    "iterations": (
        {"iteration": np.array(2**31)},
        "iteration must be a finite number in",
    ),
    "complex": (
        {slot: np.ones(3 if "bias" in slot else (2, 3), "F") for slot in SLOTS},
        "net/kernel_velocity is complex",
    ),
    "float64": (
        {slot: np.ones(3 if "bias" in slot else (2, 3)) for slot in SLOTS},
        'jax.config.update("jax_enable_x64", True)',
    ),
}


@pytest.mark.parametrize(("arrays", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_variables(arrays, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        keras.import_state(RMSprop(**arrays), convert, NAMES)


BAD_NAMES = {
    "order": (NAMES[::-1], "names must be in the order of the optimizer"),
    "few": (NAMES[:1], "there are 6 variables, but 4 belong to the configuration"),
    "many": ([*NAMES, "c"], "there are 6 variables, but 8 belong to the configuration"),
    "repeated": (["a", "a"], "names must be different, but ['a'] are repeated"),
    "text": ("kernel", "names must be those of the trainable variables"),
    "shapes": (
        {"net/kernel": ONES.T, "net/bias": ONES[0]},
        "net/kernel_velocity must be float32[3, 2], got float32[2, 3]",
    ),
}


@pytest.mark.parametrize(("names", "message"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_bad_names_are_reported(names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        keras.import_state(RMSprop(), convert, names)


def test_names_are_needed_where_there_are_none():
    arrays = [v.value for v in RMSprop().variables]
    with pytest.raises(ValueError, match=r"model\.trainable_variables"):
        keras.import_state(arrays, convert, config=CONFIG)
    with pytest.raises(
        ValueError, match=r"config must be what optimizer.get_config\(\)"
    ):
        keras.import_state(arrays, convert, NAMES)
    with pytest.raises(
        ValueError, match="an optimizer of Keras, its variables, or the p"
    ):
        keras.import_state(3, convert, NAMES)


@pytest.mark.parametrize(
    "bad",
    [
        lambda arrays: {"w": jnp.asarray(arrays["net/kernel"])},
        lambda arrays: {k: 2 * jnp.asarray(x) for k, x in arrays.items()},
        lambda arrays: {k: jnp.asarray(x, jnp.bfloat16) for k, x in arrays.items()},
        lambda arrays: arrays["kernel"],
    ],
)
def test_bad_conversions(bad):
    with pytest.raises(ValueError, match="convert"):
        keras.import_state(RMSprop(), bad, NAMES)


def test_bad_exports_are_reported():
    optimizer = RMSprop()
    _, state = keras.import_state(optimizer, convert, NAMES)

    def export(state=state, convert_back=convert_back, names=NAMES, like=optimizer):
        return keras.export_state(state, convert_back, names, like=like)

    assert export()
    plain = RMSprop(CONFIG | {"momentum": 0.0}, **dict.fromkeys(SLOTS[2:]))
    with pytest.raises(
        ValueError, match=r"like has the slots \['velocity'\], the state"
    ):
        export(like=plain)
    with pytest.raises(ValueError, match="'net/kernel' is only in like"):
        export(convert_back=lambda p: {"kernel": p["w"].T, "net/bias": p["b"]})
    with pytest.raises(ValueError, match=r"must have shape \(2, 3\) as in like"):
        export(convert_back=lambda p: {"net/kernel": p["w"], "net/bias": p["b"]})
    with pytest.raises(TypeError, match="needs the RMSpropState"):
        export(state=state.inner_state)
    with pytest.raises(ValueError, match="there are 2 variables, but 6 belong"):
        export(like=RMSprop(**NO_SLOTS))
    slots = {v.name: v.value.astype(np.float16) for v in optimizer.variables[2:]}
    half = RMSprop(**slots)
    large = jax.tree.map(lambda x: 1e6 * x, state.inner_state)
    with pytest.raises(
        ValueError, match="net/kernel_velocity is not finite, as float16"
    ):
        export(state=state._replace(inner_state=large), like=half)


def test_h5py_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py"):
        keras.import_state("model.keras", convert, NAMES)
