# SPDX-License-Identifier: Apache-2.0
"""Files and checkpoints that tf.keras and Keras 3 wrote on TensorFlow, as recorded.

record_saved_files.py, beside the tests of the TensorFlow dialect, says how.
"""

import functools
import json
import pathlib

import numpy as np

FOLDER = (
    pathlib.Path(__file__).resolve().parents[1]
    / "dialects"
    / "tensorflow"
    / "golden"
    / "saved"
)
HEADER = json.loads((FOLDER / "saved_files.json").read_text())
RUNS = HEADER["runs"]
SAVED_AT = HEADER["saved_at"]
# By the name of each trained variable, in the order of the model, its shape.
SHAPES = {name: tuple(shape) for name, shape in HEADER["shapes"].items()}


@functools.cache
def arrays():
    with np.load(FOLDER / "saved_files.npz") as file:
        return dict(file)


def path(run, ending):
    """The file of a run after `SAVED_AT` steps, for example ``path("new", ".h5")``."""
    return FOLDER / f"{run}{ending}"


def checkpoint(run, kind="checkpoint"):
    """All arrays of a checkpoint by name, as ``tf.train.load_checkpoint`` gives them.

    ``kind`` is one of those that are listed in ``RUNS[run]["checkpoints"]``: all are
    written after `SAVED_AT` steps, apart from "last", after all.
    """
    prefix = f"{run}/{kind}/"
    found = {
        key.removeprefix(prefix): value
        for key, value in arrays().items()
        if key.startswith(prefix)
    }
    return {k: v.tobytes() if v.dtype == np.uint8 else v for k, v in found.items()}


def gradients():
    """The gradients of the steps after `SAVED_AT`, by variable."""
    return split(arrays()["gradients"][SAVED_AT:])


def trajectory(run):
    """The parameters after each step after `SAVED_AT`, by variable."""
    return split(arrays()[f"{run}/params"])


def split(rows):
    """Rows of twelve numbers as arrays by the names of the variables."""
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    parts = np.split(rows, np.cumsum(sizes)[:-1], axis=-1)
    return {
        name: part.reshape(*part.shape[:-1], *shape)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }
