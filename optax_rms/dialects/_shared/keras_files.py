# SPDX-License-Identifier: Apache-2.0
"""The optimizer in a file of Keras 3 or tf.keras, read without either of them."""

import io
import json
import os
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class KerasFile(NamedTuple):
    """The optimizer in a file.

    Attributes:
      config: the serialized optimizer, for example ``{"class_name": "RMSprop",
        "config": {"rho": 0.9, ...}}``; ``None`` where the file holds no configuration,
        as a ``.weights.h5`` file never does.
      variables: arrays in the order of the optimizer's variables. In an ``.h5`` file
        their keys are the names of the variables, for example
        ``"rmsprop/dense_kernel_velocity"`` (Keras 3) or ``"velocity/dense/kernel:0"``
        (tf.keras); otherwise the keys are positions, ``"0"``, ``"1"`` and so on.
      is_named: whether the keys are names.
    """

    config: Any
    variables: dict[str, np.ndarray]
    is_named: bool


def read(path: str | os.PathLike[str]) -> KerasFile:
    """Read a file that ``model.save`` or ``model.save_weights`` has written.

    The format follows from the bytes in the file and not from its name: a ``.keras``
    archive, an ``.h5`` file of a whole model, or a ``.weights.h5`` file.

    Raises:
      ValueError: the file is damaged, has another format, or holds no variables of an
        optimizer.
      ImportError: h5py is missing.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "reading a file of Keras needs h5py: pip install h5py"
        ) from error
    config, weights = None, os.fspath(path)
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"
    try:
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                model = json.loads(archive.read("config.json"))
                weights = io.BytesIO(archive.read("model.weights.h5"))
            config = (model.get("compile_config") or {}).get("optimizer")
        with h5py.File(weights) as file:
            named: Any = file.get("optimizer_weights")
            if is_named := named is not None:
                training = json.loads(file.attrs.get("training_config", "{}"))
                config = training.get("optimizer_config")
                variables = {
                    name: _read_dataset(named[name]) for name in _weight_names(named)
                }
            else:
                # A LossScaleOptimizer stores the variables of its inner optimizer
                # twice: among its own, and in a group of their own.
                inner: Any = file.get("optimizer/inner_optimizer/vars")
                group: Any = file.get("optimizer/vars", {}) if inner is None else inner
                variables = {key: _read_dataset(data) for key, data in group.items()}
    except Exception as error:  # Each kind of damage has its own exception.
        raise ValueError(f"{path} is damaged, or no file of Keras: {error}") from error
    if not variables:
        raise ValueError(f"{path} holds no optimizer. {_what_to_do(config)}")
    return KerasFile(config, variables, is_named)


def _what_to_do(config: Any) -> str:
    module = config.get("module") if isinstance(config, dict) else None
    if "legacy" in str(module):
        return (
            "tf.keras stores the variables of legacy optimizers in .h5 files and in "
            "checkpoints of TensorFlow, but not in .keras and .weights.h5 files."
        )
    return (
        "Compile the model, and train it or build its optimizer, before saving it. Of "
        "a legacy optimizer of tf.keras, save an .h5 file or a checkpoint."
    )


def _weight_names(group: Any) -> list[str]:
    """The names of the variables, in the order of the optimizer."""
    attributes = group.attrs
    if "weight_names" in attributes:
        names = list(attributes["weight_names"])
    else:
        # HDF5 limits an attribute to 64 kB, so that Keras numbers the parts of more.
        names, part = [], 0
        while (key := f"weight_names{part}") in attributes:
            names += list(attributes[key])
            part += 1
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]


def _read_dataset(data: Any) -> np.ndarray:
    array = data[()]
    # HDF5 has no bfloat16, so that Keras writes two bytes without a type.
    return array.view(jnp.bfloat16) if getattr(array, "dtype", None) == "V2" else array
