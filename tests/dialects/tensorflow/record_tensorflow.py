# SPDX-License-Identifier: Apache-2.0
"""Record what TensorFlow's RMSProp does, for the tests to compare with.

TensorFlow cannot be installed beside every JAX, so the tests read what this script
wrote. In an environment with tensorflow and tf_keras:

    python tests/dialects/tensorflow/record_tensorflow.py

writes tensorflow.npz (the arrays) and tensorflow.json (what they are, from which
versions, and the names in the checkpoints) into the folder golden beside it.
"""

import datetime
import functools
import json
import os
import pathlib
import platform
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Another order of summation in the vectorised kernels would change the last bits.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow as tf
import tf_keras

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from helpers.reference import gradient_stream

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
STEPS = 75
# The columns of `gradient_stream`, dealt out to two variables.
SHAPES = {"kernel": (4, 2), "bias": (4,)}
CHANGING = "changing"

# Centered cases run in float64: in float32 the frameworks lose the variance of a large
# constant gradient to cancellation, and what is left is rounding error.
CASES = {
    "rmsprop": {
        "defaults": {},
        "decay": {"decay": 0.99},
        "momentum": {"momentum": 0.9},
        "epsilon": {"epsilon": 1e-3},
        "centered": {"centered": True},
        "changing": {"learning_rate": CHANGING},
        "momentum_changing": {"learning_rate": CHANGING, "momentum": 0.9},
        "everything": {
            "learning_rate": CHANGING,
            "decay": 0.95,
            "momentum": 0.8,
            "epsilon": 1e-2,
            "centered": True,
        },
        "long": {"learning_rate": CHANGING, "momentum": 0.9, "steps": 1000},
    },
    "legacy_keras_rmsprop": {
        "defaults": {},
        "rho": {"rho": 0.99},
        "momentum": {"momentum": 0.9},
        "momentum_of_zero_as_a_tensor": {"momentum": "tensor"},
        "epsilon": {"epsilon": 1e-3},
        "epsilon_of_zero": {"epsilon": 0.0},
        "centered": {"centered": True},
        "centered_momentum": {"centered": True, "momentum": 0.9},
        "decay": {"decay": 0.1},
        "decay_of_a_schedule": {"learning_rate": "exponential", "decay": 0.1},
        "changing": {"learning_rate": CHANGING},
        "momentum_changing": {"learning_rate": CHANGING, "momentum": 0.9},
        "clipnorm": {"clipnorm": 1.0},
        "clipvalue": {"clipvalue": 0.5},
        "global_clipnorm": {"global_clipnorm": 1.0},
        "clipvalue_and_clipnorm": {"clipvalue": 0.5, "clipnorm": 1.0},
        "everything": {
            "learning_rate": CHANGING,
            "rho": 0.95,
            "momentum": 0.8,
            "epsilon": 1e-2,
            "centered": True,
            "decay": 0.01,
            "clipvalue": 5.0,
            "global_clipnorm": 4.0,
        },
        "long": {"learning_rate": CHANGING, "steps": 1000},
        "not_a_number": {
            "centered": True,
            "constant_gradients": True,
            "steps": 200,
            "dtype": "float32",
        },
    },
}
DEFAULT_EPSILON = {"rmsprop": 1e-10, "legacy_keras_rmsprop": 1e-7}

CHECKPOINTS = {
    "graph": ("rmsprop", {"momentum": 0.9}),
    "graph_centered": ("rmsprop", {"momentum": 0.9, "centered": True}),
    "graph_without_momentum": ("rmsprop", {}),
    "object": ("rmsprop", {"momentum": 0.9}),
    "object_centered": ("rmsprop", {"momentum": 0.9, "centered": True}),
    "object_legacy_keras": ("legacy_keras_rmsprop", {"clipvalue": 5.0}),
    "object_legacy_keras_momentum": (
        "legacy_keras_rmsprop",
        {"momentum": 0.9, "centered": True},
    ),
}


def changing_rates(steps):
    """A learning rate that changes at every step and jumps three times."""
    t = np.arange(steps)
    return (1e-2 * (1 + 0.5 * np.sin(t)) * 0.3 ** (4 * t // steps)).astype(np.float32)


def split(row):
    """A row of gradients as one array per variable."""
    kernel = int(np.prod(SHAPES["kernel"]))
    parts = np.split(row, [kernel])
    return [p.reshape(s) for p, s in zip(parts, SHAPES.values(), strict=True)]


def join(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


class GraphOptimizer:
    """``tf.compat.v1.train.RMSPropOptimizer`` in a graph, checkpoints by ``Saver``."""

    def __init__(self, dtype, learning_rate, arguments):
        self.graph = tf.Graph()
        v1 = tf.compat.v1
        with self.graph.as_default():
            zero = v1.zeros_initializer()
            self.variables = [
                v1.get_variable(f"dense/{name}", shape, dtype, zero)
                for name, shape in SHAPES.items()
            ]
            self.rate = v1.placeholder(tf.float64, ())
            self.gradients = [v1.placeholder(dtype, s) for s in SHAPES.values()]
            rate = learning_rate if learning_rate is not None else self.rate
            self.optimizer = v1.train.RMSPropOptimizer(rate, **arguments)
            self.step = self.optimizer.apply_gradients(
                zip(self.gradients, self.variables, strict=True),
                global_step=v1.train.get_or_create_global_step(),
            )
            self.session = v1.Session(graph=self.graph)
            self.session.run(v1.global_variables_initializer())
            self.saver = v1.train.Saver()

    def apply(self, gradients, rate):
        feed = dict(zip(self.gradients, gradients, strict=True))
        self.session.run(self.step, feed | {self.rate: rate})

    def read(self, variables):
        return join(self.session.run(variables))

    def slots(self):
        return {
            slot: self.read([self.optimizer.get_slot(v, slot) for v in self.variables])
            for slot in self.optimizer.get_slot_names()
        }

    def save(self, path):
        with self.graph.as_default():
            return self.saver.save(self.session, path)


class ObjectOptimizer:
    """Either optimizer, eagerly, checkpoints by ``tf.train.Checkpoint``."""

    def __init__(self, dtype, optimizer, set_rate):
        self.set_rate = set_rate
        self.model = tf.Module()
        self.model.dense = tf.Module()
        self.variables = []
        for name, shape in SHAPES.items():
            variable = tf.Variable(tf.zeros(shape, dtype), name=f"dense/{name}")
            setattr(self.model.dense, name, variable)
            self.variables.append(variable)
        self.optimizer = optimizer
        self.checkpoint = tf.train.Checkpoint(model=self.model, optimizer=optimizer)

    def apply(self, gradients, rate):
        if rate is not None:
            self.set_rate(rate)
        gradients = [tf.constant(g) for g in gradients]
        self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))

    def read(self, variables):
        return join([v.numpy() for v in variables])

    def slots(self):
        return {
            slot: self.read([self.optimizer.get_slot(v, slot) for v in self.variables])
            for slot in self.optimizer.get_slot_names()
        }

    def save(self, path):
        return self.checkpoint.write(path)


def eager_rmsprop(dtype, arguments):
    rate = tf.Variable(0.0)
    optimizer = tf.compat.v1.train.RMSPropOptimizer(lambda: rate, **arguments)
    return ObjectOptimizer(dtype, optimizer, rate.assign)


def legacy_keras_rmsprop(dtype, learning_rate, arguments):
    arguments = dict(arguments)
    if learning_rate == "exponential":
        learning_rate = tf_keras.optimizers.schedules.ExponentialDecay(1e-2, 10, 0.5)
    if arguments.get("momentum") == "tensor":
        arguments["momentum"] = tf.constant(0.0)
    optimizer = tf_keras.optimizers.legacy.RMSprop(learning_rate, **arguments)
    set_rate = functools.partial(setattr, optimizer, "learning_rate")
    return ObjectOptimizer(dtype, optimizer, set_rate)


def record_trajectory(name, dialect, case, arrays):
    """Run one case; add its arrays and return its description."""
    case = dict(case)
    steps = case.pop("steps", STEPS)
    dtype = case.pop("dtype", "float64" if case.get("centered") else "float32")
    learning_rate = case.pop("learning_rate", 1e-2)
    eps = case.get("epsilon") or DEFAULT_EPSILON[dialect]
    gradients = gradient_stream(steps, eps)
    if case.pop("constant_gradients", False):
        gradients[:] = np.geomspace(0.1, 1000, gradients.shape[1])
    rates = changing_rates(steps) if learning_rate == CHANGING else [None] * steps
    rate = None if learning_rate == CHANGING else learning_rate
    if dialect == "rmsprop":
        run = GraphOptimizer(dtype, rate, case)
        rates = [0.0 if r is None else r for r in rates]
    else:
        run = legacy_keras_rmsprop(dtype, rate or 1e-2, case)
    trajectory = []
    for row, rate in zip(gradients.astype(dtype), rates, strict=True):
        run.apply(split(row), rate)
        trajectory.append(run.read(run.variables))
    stream = next((k for k, v in arrays.items() if np.array_equal(v, gradients)), None)
    if stream is None:
        stream = f"gradients/{name}"
        arrays[stream] = gradients
    arrays[f"{name}/params"] = np.stack(trajectory)
    for slot, value in run.slots().items():
        arrays[f"{name}/{slot}"] = value
    return {
        "dialect": dialect,
        "learning_rate": learning_rate,
        "arguments": case,
        "dtype": dtype,
        "steps": steps,
        "gradients": stream,
    }


def record_checkpoint(name, dialect, arguments, arrays):
    """Run 75 steps and keep whole checkpoints after 25, 50 and 75 of them."""
    # In place of the large constant and the jump, whose variance float32 loses to
    # cancellation, columns of which the mean is half of the standard deviation.
    gradients = gradient_stream(STEPS, 1e-3, seed=1)
    others = gradients[::-1, :4]
    gradients[:, 8:] = (others + others.std(axis=0) / 2) / 2
    rates = changing_rates(STEPS)
    if name.startswith("checkpoint/graph"):
        run = GraphOptimizer("float32", None, arguments)
    elif dialect == "rmsprop":
        run = eager_rmsprop("float32", arguments)
    else:
        run = legacy_keras_rmsprop("float32", 1e-2, arguments)
    names = None
    with tempfile.TemporaryDirectory() as folder:
        for step, (row, rate) in enumerate(zip(gradients, rates, strict=True), 1):
            run.apply(split(row), rate)
            if step % 25:
                continue
            path = run.save(f"{folder}/{step}")
            names = tf.train.list_variables(path)
            reader = tf.train.load_checkpoint(path)
            for key, _ in names:
                value = np.asarray(reader.get_tensor(key))
                if value.dtype.kind in "fi":
                    arrays[f"{name}/{step}/{key}"] = value
    arrays["gradients/checkpoints"] = gradients
    return {
        "dialect": dialect,
        "learning_rate": CHANGING,
        "arguments": arguments,
        "dtype": "float32",
        "steps": STEPS,
        "gradients": "gradients/checkpoints",
        "variables": {key: list(shape) for key, shape in names},
    }


def main():
    arrays = {f"rates/{n}": changing_rates(n) for n in (STEPS, 1000)}
    cases = {
        f"{dialect}/{name}": record_trajectory(
            f"{dialect}/{name}", dialect, case, arrays
        )
        for dialect, group in CASES.items()
        for name, case in group.items()
    }
    checkpoints = {
        f"checkpoint/{name}": record_checkpoint(
            f"checkpoint/{name}", dialect, arguments, arrays
        )
        for name, (dialect, arguments) in CHECKPOINTS.items()
    }
    header = {
        "generator": "tests/dialects/tensorflow/record_tensorflow.py",
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "tf_keras": tf_keras.__version__,
            "numpy": np.__version__,
        },
        "device": f"CPU, {platform.machine()}",
        "inputs": "Parameters start at zero. Gradients and changing learning rates are "
        "those of gradient_stream (tests/helpers/reference.py) and changing_rates, "
        "stored in the arrays gradients/* and rates/* as used.",
        "cases": cases,
        "checkpoints": checkpoints,
    }
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN / "tensorflow.npz", **arrays)
    (GOLDEN / "tensorflow.json").write_text(json.dumps(header, indent=1) + "\n")


if __name__ == "__main__":
    main()
