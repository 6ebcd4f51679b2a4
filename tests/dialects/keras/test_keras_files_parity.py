# SPDX-License-Identifier: Apache-2.0
"""Files that Keras saves, whole and damaged."""

import io
import json
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.comparison import assert_same_bits
from helpers.frameworks import require
from helpers.keras_runs import keras

from optax_rms.dialects import keras as dialect
from optax_rms.dialects._shared import chain_state

h5py = require("h5py")

pytestmark = [
    pytest.mark.parity,
    # Of Keras' own variables, under NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with numbers in its optimizer, and the folder that it is saved in."""
    layers = keras.layers
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.Dense(1)])
    rate = keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.5)
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
    save(model, folder)
    return model, folder


def save(model, folder):
    """All three files; the .h5 last, as it makes Keras forget the optimizer."""
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    model.save(folder / "model.h5")


def names_of(model):
    return [v.path for v in model.trainable_variables]


def flat(arrays):
    """A conversion that keeps everything."""
    return {name.replace("/", "_"): jnp.asarray(x) for name, x in arrays.items()}


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
        (folder / "model.h5", None, None),
        (folder / "model.h5", names, config),
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
        assert_same_bits(state, expected)
        if i == 1:
            assert_same_bits(tx.update(gradients, state, gradients)[0], updates)
        back = dialect.export_state(
            state, back_to(own_names), own_names, like=source, config=own_config
        )
        assert_same_bits(back, exported)
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
    params = chain_state.fields(state.inner_state)["nu"]
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
    save(model, tmp_path)
    names = names_of(model)
    for source in (model.optimizer, tmp_path / "model.keras", tmp_path / "model.h5"):
        _, state = dialect.import_state(source, flat, names)
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
        exported = dialect.export_state(state, back_to(names), names, like=source)
        again = dialect.import_state(
            exported, flat, names, config=model.optimizer.get_config()
        )
        assert_same_bits(again[1], state)
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


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5", "model.h5"])
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
    for source in (scaled := keras.optimizers.LossScaleOptimizer(adam), adam):
        with pytest.raises(ValueError, match="must be an RMSprop, got Adam"):
            dialect.import_state(source, flat)
    with pytest.raises(ValueError, match="must be an RMSprop, got Adam"):
        dialect.import_state(scaled.variables, flat, config=scaled.get_config())
    with pytest.raises(ValueError, match=r"model\.optimizer"):
        dialect.import_state(model, flat)
    with pytest.raises(ValueError, match="Is the optimizer built"):
        dialect.import_state(keras.optimizers.RMSprop(), flat, names_of(model))
    with pytest.raises(ValueError, match=r"trainable variables\. Is the"):
        dialect.import_state(keras.optimizers.RMSprop(), flat)
    with pytest.raises(FileNotFoundError):
        dialect.import_state("no such file.keras", flat, names_of(model))


def compiled(optimizer, policy="float32"):
    """A model with numbers in the variables of its optimizer."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
        model.compile(optimizer, loss="mse")
    finally:
        keras.config.set_dtype_policy(before)
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    for v in model.optimizer.variables:
        v.assign(7 if "int" in v.dtype else rng.uniform(1, 2, v.shape))
    return model


# A model of this policy wraps its optimizer in a LossScaleOptimizer.
@pytest.mark.parametrize("policy", ["mixed_float16", "float32"])
def test_loss_scales(tmp_path, policy):
    optimizer = keras.optimizers.RMSprop(momentum=0.9, use_ema=True)
    if policy == "float32":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = compiled(optimizer, policy)
    optimizer, names = model.optimizer, names_of(model)
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    inner, config = optimizer.inner_optimizer, optimizer.get_config()
    inner.iterations.assign(5)
    inner.learning_rate = 0.25
    save(model, tmp_path)
    tx, expected = dialect.import_state(inner, flat)
    gradients = jax.tree.map(jnp.ones_like, expected.average)
    updates, _ = tx.update(gradients, expected, gradients)
    exported = dialect.export_state(expected, dict, like=inner)
    serialized = keras.optimizers.serialize(optimizer)
    sources = [
        (optimizer, None, None),
        (tmp_path / "model.keras", names, None),
        (tmp_path / "model.h5", None, None),
        (tmp_path / "model.weights.h5", names, config),
        (tmp_path / "model.weights.h5", names, serialized),
        (tmp_path / "model.weights.h5", names, inner.get_config()),
        (optimizer.variables, None, config),
        (optimizer.variables, None, inner.get_config()),
        ([v.value for v in optimizer.variables], names, config),
        ([v.value for v in inner.variables], names, config),
        (exported, names, serialized),
    ]
    for source, own_names, own_config in sources:
        tx, state = dialect.import_state(source, flat, own_names, config=own_config)
        assert_same_bits(state, expected)
        assert_same_bits(tx.update(gradients, state, gradients)[0], updates)
        back = dialect.export_state(
            state, back_to(own_names), own_names, like=source, config=own_config
        )
        assert_same_bits(back, exported)
    inner.load_own_variables(exported)


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule of a user's."""

    def __call__(self, step):
        return 0.01 * 0.5 ** (step / 1000)

    def get_config(self):
        return {}


class Secret(Halving):
    """A schedule of a user's without a configuration, so that no file holds it."""

    def get_config(self):
        raise NotImplementedError


@pytest.mark.parametrize("schedule", [Halving, Secret])
def test_schedules_of_users_are_named(tmp_path, schedule):
    model = compiled(keras.optimizers.RMSprop(schedule(), momentum=0.9))
    sources = [(model.optimizer, None)]
    if schedule is Halving:
        save(model, tmp_path)
        config = model.optimizer.get_config()
        sources += [
            (tmp_path / "model.keras", None),
            (tmp_path / "model.h5", None),
            (tmp_path / "model.weights.h5", config),
        ]
    for source, config in sources:
        options = {"names": names_of(model), "config": config}
        with pytest.raises(
            ValueError, match=f"got the class {schedule.__name__}. Pass learning_rate"
        ):
            dialect.import_state(source, flat, **options)
        tx, state = dialect.import_state(
            source,
            flat,
            learning_rate=lambda count: 0.01 * jnp.float32(count),
            **options,
        )
        # The mean square stays the same, so that the step is the learning rate.
        square = chain_state.fields(state.inner_state)["nu"]
        updates, _ = tx.update(jax.tree.map(jnp.sqrt, square), state)
        traces = chain_state.fields(state.inner_state)["trace"]
        for name, update in updates.items():
            np.testing.assert_allclose(update, 0.9 * traces[name] - 0.07, rtol=1e-6)


def test_names_too_long_for_one_attribute(tmp_path):
    """HDF5 limits attributes to 64 kB."""
    layers = [keras.layers.Dense(1, name=str(i) + 4000 * "x") for i in range(5)]
    model = keras.Sequential([keras.Input((1,)), *layers])
    model.compile(keras.optimizers.RMSprop(momentum=0.9))
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5") as file:
        assert "weight_names" not in file["optimizer_weights"].attrs
    _, state = dialect.import_state(tmp_path / "model.h5", flat)
    _, expected = dialect.import_state(model.optimizer, flat)
    assert_same_bits(state, expected)


def test_a_file_without_its_configuration(tmp_path):
    """Keras forgets the optimizer when it writes an .h5 file, and then a .keras."""
    model = compiled(keras.optimizers.RMSprop())
    model.save(tmp_path / "model.h5")
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="holds no configuration of its optimizer"):
        dialect.import_state(tmp_path / "model.keras", flat, names_of(model))
    dialect.import_state(
        tmp_path / "model.keras",
        flat,
        names_of(model),
        config=model.optimizer.get_config(),
    )


def test_decay_is_left_out_where_the_user_says():
    """Files do not hold the parameters that do not decay."""
    optimizer = keras.optimizers.RMSprop(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model = compiled(optimizer)
    names, config = names_of(model), optimizer.get_config()
    tx, state = dialect.import_state(optimizer, flat)
    params = jax.tree.map(jnp.ones_like, chain_state.fields(state.inner_state)["nu"])
    expected, _ = tx.update(params, state, params)
    for mask in (
        {"d_kernel": False, "d_bias": True},
        lambda params: {name: "bias" in name for name in params},
    ):
        tx, state = dialect.import_state(
            optimizer.variables,
            lambda arrays: {name[name.index("d_") :]: x for name, x in arrays.items()},
            [name.replace("/", "_") for name in names],
            config=config,
            exclude_from_weight_decay=mask,
        )
        own = {name[name.index("d_") :]: x for name, x in params.items()}
        updates, _ = tx.update(own, state, own)
        assert_same_bits(list(updates.values()), list(expected.values()))
