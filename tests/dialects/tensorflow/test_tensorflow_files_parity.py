# SPDX-License-Identifier: Apache-2.0
"""Files ``.h5`` that tf.keras wrote with its legacy optimizers, imported from the path.

record_saved_files.py records them. Each run is saved after 25 steps, and the import is
proved by the steps 26 to 50, on the recorded gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tensorflow_files as files
from helpers.frameworks import require
from helpers.reference import relative_error

from optax_rms import dialects

h5py = require("h5py")

# As in test_tensorflow_checkpoints.py.
BOUND = 2e-5
REJECTED = 100 * BOUND

LEGACY = [name for name, run in files.RUNS.items() if run["family"] == "legacy"]


def import_file(path, **arguments):
    return dialects.tensorflow.import_state(path, lambda v: dict(v), **arguments)


def variables_of(path):
    """The variables of the model in a file, by name."""
    with h5py.File(path) as file:
        return {
            name: jnp.asarray(file[f"model_weights/{name.split('/')[0]}/{name}:0"][()])
            for name in files.SHAPES
        }


def error_of(run, tx, state):
    """The worst difference of the steps 26 to 50, relative to their path."""
    start = variables_of(files.path(run, ".h5"))

    @jax.jit
    def scan(carry, gradients):
        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, carry, gradients)

    gradients = jax.tree.map(jnp.asarray, files.gradients())
    _, trajectory = scan((start, state), gradients)
    expected = files.trajectory(run)
    return max(
        relative_error(
            np.float64(trajectory[name]) - np.float64(start[name]),
            np.float64(expected[name]) - np.float64(start[name]),
        )
        for name in files.SHAPES
    )


@pytest.mark.parametrize("run", LEGACY)
def test_a_file_continues_without_further_arguments(run):
    tx, state = import_file(files.path(run, ".h5"))
    assert error_of(run, tx, state) <= BOUND


@pytest.mark.parametrize(
    ("run", "changes"),
    [
        ("legacy_everything", {"epsilon": 2e-3}),
        ("legacy", {"rho": 0.91}),
        ("legacy_momentum", {"momentum": 0.89}),
        ("legacy_everything", {"clipvalue": 0.49}),
        ("legacy_everything", {"decay": 0.011}),
        ("legacy_schedule", {"step": 24}),
    ],
)
def test_the_data_reject_other_arguments(run, changes):
    assert error_of(run, *import_file(files.path(run, ".h5"), **changes)) >= REJECTED


@pytest.mark.parametrize("run", LEGACY)
def test_a_file_and_a_checkpoint_hold_the_same(run):
    _, state = import_file(files.path(run, ".h5"))
    variables = files.checkpoint(run)
    value = "/.ATTRIBUTES/VARIABLE_VALUE"
    keys = {
        f"{layer}/{weight}": f"model/layer_with_weights-{i}/{weight}{value}"
        for i, layer in enumerate(("hidden", "out"))
        for weight in ("kernel", "bias")
    }
    description = files.RUNS[run]["arguments"]
    arguments: dict[str, Any] = {"centered": description.get("centered", False)}
    if "schedule" in run:
        arguments["learning_rate"] = optax.exponential_decay(1e-2, 10, 0.5)
    _, expected = dialects.tensorflow.import_state(
        variables,
        lambda v: {name: v[key] for name, key in keys.items()},
        **arguments,
    )
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("run", LEGACY)
def test_export_after_import_gives_the_variables_of_the_file(run):
    path = files.path(run, ".h5")
    _, state = import_file(path)
    exported = dialects.tensorflow.export_state(state, dict, path)
    with h5py.File(path) as file:
        group = file["optimizer_weights"]
        names = [str(name) for name in group.attrs["weight_names"]]
        stored = {name.removesuffix(":0"): group[name][()] for name in names}
    # A constant learning rate needs no number of steps, so that none is known.
    has_count = {"learning_rate", "decay"} & files.RUNS[run]["arguments"].keys()
    if not has_count:
        del stored[next(iter(stored))]
    assert list(exported) == list(stored)
    for name, array in stored.items():
        np.testing.assert_array_equal(exported[name], array)
        assert exported[name].dtype == array.dtype


def test_the_schedule_may_be_given():
    path = files.path("legacy_schedule", ".h5")
    _, state = import_file(path, learning_rate=0.5)
    assert state[1] == optax.EmptyState()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "new.h5",
            {},
            r"must hold an RMSprop of tf\.keras before 2\.11.*dialects\.kera",
        ),
        ("new_everything.keras", {}, r"dialects\.keras\.import_state"),
        ("new_everything.weights.h5", {}, r"dialects\.keras\.import_state"),
        ("legacy_momentum.keras", {}, r"holds no optimizer.*\.h5 files and in check"),
        ("legacy_momentum.weights.h5", {}, "holds no optimizer.*legacy optimizer"),
        ("model.ckpt-1000", {}, r"is no file.*tf\.train\.load_checkpoint"),
        ("saved_files.json", {}, "is damaged, or no file of Keras"),
        ("legacy.h5", {"optimizer": "Slow"}, "optimizer must be 'RMSprop'"),
        ("legacy.h5", {"names": ["out/bias"]}, "hidden/kernel has slots .* not among"),
        (
            "legacy_momentum.h5",
            {"momentum": 0.0},
            "nothing needs Slow/hidden/kernel/mom",
        ),
        ("legacy.h5", {"centered": True}, "hidden/kernel has no slot for mg"),
        (
            "legacy.h5",
            {"dialect": dialects.tensorflow.rmsprop},
            r"dialect must be legacy_keras_rmsprop, because RMSprop is .* before 2\.11",
        ),
    ],
)
def test_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        import_file(files.FOLDER / name, **arguments)


def test_another_optimizer_in_a_file(tmp_path):
    source = files.path("legacy", ".h5").read_bytes()
    path = tmp_path / "adam.h5"
    path.write_bytes(
        source.replace(b'"class_name": "RMSprop"', b'"class_name": "Adamaxx"')
    )
    with pytest.raises(ValueError, match="got 'Adamaxx'"):
        import_file(path)
