# SPDX-License-Identifier: Apache-2.0
"""Files of tf.keras from 2.11 on, as recorded, read without TensorFlow."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tensorflow_files as files
from helpers.frameworks import require
from helpers.keras_runs import BOUND, path_error, run_dialect

from optax_rms.dialects import keras as dialect

h5py = require("h5py")

NAMES = list(files.SHAPES)
NEW = [
    ("new", ".h5"),
    ("new_named", ".h5"),
    ("new_schedule", ".h5"),
    *(("new_everything", ending) for ending in (".h5", ".keras", ".weights.h5")),
    *(("new_loss_scale", ending) for ending in (".h5", ".keras", ".weights.h5")),
]


def convert(arrays):
    """To a tree with other names, in another order, transposed."""
    return {
        name: {
            "w": jnp.asarray(arrays[f"{name}/kernel"]).T,
            "b": arrays[f"{name}/bias"],
        }
        for name in ("out", "hidden")
    }


def weights_of(run):
    """The parameters in the file."""
    with h5py.File(files.path(run, ".h5")) as file:
        group = file["model_weights"]
        return {n: group[n.partition("/")[0]][f"{n}:0"][()] for n in NAMES}


def flat(tree):
    """Steps of the tree of `convert`, as rows in the order of the model."""
    parts = []
    for name in ("hidden", "out"):
        w, b = np.asarray(tree[name]["w"]), np.asarray(tree[name]["b"])
        parts += [np.swapaxes(w, -1, -2).reshape(*w.shape[:-2], -1), b]
    return np.concatenate(parts, axis=-1)


def continued(run, tx, state):
    """The error of the continued run, relative to the path since the file."""
    params, gradients = convert(weights_of(run)), files.gradients()
    steps = [
        convert(dict(zip(gradients, leaves, strict=True)))
        for leaves in zip(*gradients.values(), strict=True)
    ]
    stacked = {
        layer: {
            key: np.stack([step[layer][key] for step in steps]) for key in ("w", "b")
        }
        for layer in ("out", "hidden")
    }
    ours, _, _ = run_dialect(tx, params, stacked, state)
    theirs = np.concatenate(
        [x.reshape(len(x), -1) for x in files.trajectory(run).values()], axis=-1
    )
    start = flat(params)
    return path_error(flat(ours) - start, theirs - start)


def import_file(run, ending, **options):
    config = files.RUNS[run]["config"] if ending == ".weights.h5" else None
    names = None if ending == ".h5" else NAMES
    return dialect.import_state(
        files.path(run, ending), convert, names, config=config, **options
    )


@pytest.mark.parametrize(("run", "ending"), NEW)
def test_runs_continue(run, ending):
    tx, state = import_file(run, ending)
    assert state.count == files.SAVED_AT
    error = continued(run, tx, state)
    assert error <= BOUND


def test_a_mistaken_order_shows():
    """Layers of the same shapes, so that no shape tells them apart."""
    swapped = [*NAMES[2:], *NAMES[:2]]
    path = files.path("new_everything", ".keras")
    tx, state = dialect.import_state(path, convert, swapped)
    assert continued("new_everything", tx, state) >= 100 * BOUND
    with pytest.raises(ValueError, match="in the order of the optimizer"):
        dialect.import_state(files.path("new_everything", ".h5"), convert, swapped)


def test_variables_of_tf_keras():
    """Lists of variables, with and without names, in place of a file."""
    path = files.path("new_everything", ".h5")
    config = files.RUNS["new_everything"]["config"]
    with h5py.File(path) as file:
        group = file["optimizer_weights"]
        values = {name: group[name][()] for name in group.attrs["weight_names"]}

    class Variable:
        """Looks like a tf.Variable; training puts the optimizer's name in front."""

        def __init__(self, name, value):
            prefix = "" if name == "iteration:0" else "RMSprop/"
            self.name, self.dtype, self.shape = prefix + name, value.dtype, value.shape
            self.assign = self._value = value

        def __array__(self, dtype=None, copy=None):
            return np.array(self._value, dtype)

    variables = [Variable(name, value) for name, value in values.items()]
    for source, names in ((variables, None), (list(values.values()), NAMES)):
        tx, state = dialect.import_state(source, convert, names, config=config)
        assert continued("new_everything", tx, state) <= BOUND


@pytest.mark.parametrize(("run", "ending"), NEW)
def test_export_is_the_inverse(run, ending):
    _, state = import_file(run, ending)
    path = files.path(run, ending)
    config = files.RUNS[run]["config"] if ending == ".weights.h5" else None
    names = None if ending == ".h5" else NAMES

    def convert_back(tree):
        arrays = {f"{layer}/kernel": tree[layer]["w"].T for layer in tree}
        return arrays | {f"{layer}/bias": tree[layer]["b"] for layer in tree}

    exported = dialect.export_state(
        state, convert_back, names, like=path, config=config
    )
    with h5py.File(files.path(run, ".h5")) as file:
        group = file["optimizer_weights"]
        stored = [(name, group[name][()]) for name in group.attrs["weight_names"]]
    assert len(exported) == len(stored)
    for i, (name, value) in enumerate(stored):
        assert exported[str(i)].dtype == value.dtype
        # A velocity beside a mean may be one of several that give the same variance.
        eps = float(np.finfo(np.float32).eps) if name.startswith("velocity") else 0.0
        np.testing.assert_allclose(exported[str(i)], value, rtol=eps)


LEGACY = {
    ".h5": "legacy RMSprop of tf.keras, whose rule is another; use dialects.tensorflow",
    ".keras": "stores the variables of legacy optimizers in .h5 files",
    ".weights.h5": "save an .h5 file or a checkpoint",
}


@pytest.mark.parametrize("ending", LEGACY)
def test_legacy_optimizers_are_refused(ending):
    path = files.path("legacy_momentum", ending)
    with pytest.raises(ValueError, match=re.escape(LEGACY[ending])):
        dialect.import_state(path, convert, NAMES, config={})
