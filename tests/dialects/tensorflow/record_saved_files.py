# SPDX-License-Identifier: Apache-2.0
"""Record files that tf.keras and Keras 3 write on TensorFlow, for the tests to import.

TensorFlow cannot be installed beside every JAX, so the tests read what this script
wrote. In an environment with tensorflow, tf_keras, keras and h5py:

    python tests/dialects/tensorflow/record_saved_files.py

writes into the folder golden/saved beside it:

    RUN.h5, RUN.keras, RUN.weights.h5   files, after 25 steps
    saved_files.npz                     checkpoints after 25 and 50 steps, as the arrays
                                        of tf.train.load_checkpoint by their names, and
                                        the parameters after each of the steps 26 to 50
    saved_files.json                    what they are, from which versions and inputs
"""

import datetime
import json
import os
import pathlib
import platform
import sys
import tempfile
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
# Another order of summation in the vectorised kernels would change the last bits.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import h5py
import keras
import numpy as np
import tensorflow as tf
import tf_keras

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from helpers.reference import gradient_stream

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden" / "saved"
STEPS, SAVED_AT = 50, 25
# The columns of the gradients, dealt out to the variables of the model in this order.
# Kernels and biases have the same shapes in both layers, so that a mistaken order shows
# in the numbers only.
SHAPES = {
    "hidden/kernel": (2, 2),
    "hidden/bias": (2,),
    "out/kernel": (2, 2),
    "out/bias": (2,),
}

SCHEDULE = "exponential"
EVERYTHING = {
    "rho": 0.95,
    "momentum": 0.8,
    "epsilon": 1e-3,
    "centered": True,
    "weight_decay": 0.1,
    "global_clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.9,
    "ema_overwrite_frequency": 10,
}
LEGACY_EVERYTHING = {
    "rho": 0.95,
    "momentum": 0.8,
    "epsilon": 1e-3,
    "centered": True,
    "decay": 0.01,
    "clipvalue": 0.5,
}
# By name: family of the optimizer, its arguments, whether a loss scale wraps it.
RUNS = {
    "new": ("new", {}, False),
    "new_named": ("new", {"jit_compile": True, "name": "Fast"}, False),
    "new_everything": ("new", EVERYTHING, False),
    "new_schedule": ("new", {"learning_rate": SCHEDULE, "momentum": 0.9}, False),
    "new_loss_scale": ("new", {"momentum": 0.9}, True),
    "legacy": ("legacy", {}, False),
    "legacy_momentum": ("legacy", {"momentum": 0.9, "name": "Slow"}, False),
    "legacy_centered": ("legacy", {"centered": True}, False),
    "legacy_everything": ("legacy", LEGACY_EVERYTHING, False),
    "legacy_schedule": ("legacy", {"learning_rate": SCHEDULE}, False),
    "legacy_loss_scale": ("legacy", {"momentum": 0.9}, True),
    "keras3": ("keras3", {}, False),
    "keras3_everything": ("keras3", EVERYTHING, False),
    "keras3_loss_scale": ("keras3", {"momentum": 0.9}, True),
}
# Of the other runs with tf_keras, .h5 is written. TensorFlow's Keras 3 writes the same
# files as Keras 3 on any backend.
FILES = {
    "new_everything": [".h5", ".keras", ".weights.h5"],
    "new_loss_scale": [".h5", ".keras", ".weights.h5"],
    "legacy_momentum": [".h5", ".keras", ".weights.h5"],
}


def build(family, arguments, has_loss_scale):
    """A compiled model of twelve parameters, which start at one."""
    library = keras if family == "keras3" else tf_keras
    optimizers = library.optimizers
    arguments = {"learning_rate": 1e-2} | arguments
    if arguments["learning_rate"] == SCHEDULE:
        schedules = optimizers.schedules
        arguments["learning_rate"] = schedules.ExponentialDecay(1e-2, 10, 0.5)
    library.mixed_precision.set_global_policy(
        "mixed_float16" if has_loss_scale else "float32"
    )
    model = library.Sequential(
        [
            library.layers.Dense(2, name="hidden", kernel_initializer="ones"),
            library.layers.Dense(2, name="out", kernel_initializer="ones"),
        ],
        name="net",
    )
    model.build((None, 2))
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    optimizer = (optimizers.legacy if family == "legacy" else optimizers).RMSprop(
        **arguments
    )
    # Compiling wraps the optimizer under the policy mixed_float16.
    model.compile(optimizer=optimizer, loss="mse")
    if family != "legacy":
        model.optimizer.build(model.trainable_variables)
    return model


def split(row):
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    parts = np.split(row, np.cumsum(sizes)[:-1])
    return [p.reshape(s) for p, s in zip(parts, SHAPES.values(), strict=True)]


def apply(model, family, row):
    """One step. The loss scale of Keras 3 divides the gradients again.

    In tf.keras a method divides them, which the training loop calls before this.
    """
    optimizer, gradients = model.optimizer, [tf.constant(g) for g in split(row)]
    if family == "keras3" and hasattr(optimizer, "dynamic_scale"):
        gradients = [g * tf.cast(optimizer.dynamic_scale, g.dtype) for g in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


def read_checkpoint(path):
    """All that is in a checkpoint, by name; its object graph as an array of bytes."""
    reader = tf.train.load_checkpoint(path)
    values = {
        name: reader.get_tensor(name) for name, _ in tf.train.list_variables(path)
    }
    return {
        name: np.frombuffer(x, np.uint8) if isinstance(x, bytes) else np.asarray(x)
        for name, x in values.items()
    }


def save_files(name, model):
    for ending in FILES.get(name, [] if name.startswith("keras3") else [".h5"]):
        save = model.save_weights if ending == ".weights.h5" else model.save
        save(str(GOLDEN / f"{name}{ending}"))


def save_checkpoint(model, folder):
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return read_checkpoint(checkpoint.write(f"{folder}/checkpoint"))


def save_other_checkpoints(model, folder):
    """The other ways to a checkpoint; the last is of two models and optimizers."""
    model.save_weights(f"{folder}/weights", save_format="tf")
    model.save(f"{folder}/model", save_format="tf")
    other = build("new", {"momentum": 0.9}, False)
    apply(other, "new", np.ones(12, np.float32))
    pair = tf.train.Checkpoint(
        actor=model,
        actor_optimizer=model.optimizer,
        critic=other,
        critic_optimizer=other.optimizer,
    )
    return {
        "weights": read_checkpoint(f"{folder}/weights"),
        "saved_model": read_checkpoint(f"{folder}/model/variables/variables"),
        "pair": read_checkpoint(pair.write(f"{folder}/pair")),
    }


def record(name, arrays):
    """Run one case; add its arrays and return its description."""
    family, arguments, has_loss_scale = RUNS[name]
    model = build(family, arguments, has_loss_scale)
    trajectory, config, checkpoints = [], None, {}
    with tempfile.TemporaryDirectory() as folder:
        for step, row in enumerate(arrays["gradients"], 1):
            apply(model, family, row)
            if step == SAVED_AT:
                config = model.optimizer.get_config()
                save_files(name, model)
                checkpoints["checkpoint"] = save_checkpoint(model, folder)
                if name in FILES:
                    checkpoints |= save_other_checkpoints(model, folder)
            elif step > SAVED_AT:
                values = [np.ravel(v.numpy()) for v in model.trainable_variables]
                trajectory.append(np.concatenate(values))
        checkpoints["last"] = save_checkpoint(model, folder)
    arrays[f"{name}/params"] = np.stack(trajectory)
    for kind, values in checkpoints.items():
        for key, value in values.items():
            arrays[f"{name}/{kind}/{key}"] = value
    return {
        "family": family,
        "arguments": arguments,
        "loss_scale": has_loss_scale,
        "config": json.loads(json.dumps(config, default=float)),
        "checkpoints": list(checkpoints),
    }


def main():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    tf.get_logger().setLevel("ERROR")
    # Columns whose mean is half of the standard deviation, in place of the large
    # constant and the jump, whose variance float32 loses to cancellation.
    gradients = gradient_stream(STEPS, 1e-3, seed=2)
    others = gradients[::-1, :4]
    gradients[:, 8:] = (others + others.std(axis=0) / 2) / 2
    arrays = {"gradients": gradients}
    warnings.simplefilter("ignore")
    runs = {name: record(name, arrays) for name in RUNS}
    header = {
        "generator": "tests/dialects/tensorflow/record_saved_files.py",
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "tf_keras": tf_keras.__version__,
            "keras": keras.__version__,
            "h5py": h5py.__version__,
            "numpy": np.__version__,
        },
        "device": f"CPU, {platform.machine()}",
        "inputs": "Parameters start at one, and the learning rate is 0.01 unless the "
        "arguments say otherwise; the schedule is ExponentialDecay(0.01, 10, 0.5). The "
        "gradients are in the array `gradients`, one row a step, dealt out to the "
        "variables in the order of `shapes`.",
        "shapes": SHAPES,
        "steps": STEPS,
        "saved_at": SAVED_AT,
        "runs": runs,
    }
    np.savez_compressed(GOLDEN / "saved_files.npz", **arrays)
    (GOLDEN / "saved_files.json").write_text(json.dumps(header, indent=1) + "\n")


if __name__ == "__main__":
    main()
