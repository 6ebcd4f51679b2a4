# SPDX-License-Identifier: Apache-2.0
"""What TensorFlow did, as recorded, and the same run in JAX."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import running

_FOLDER = (
    pathlib.Path(__file__).resolve().parents[1] / "dialects" / "tensorflow" / "golden"
)
HEADER = json.loads((_FOLDER / "tensorflow.json").read_text())
# The shape of the kernel; the bias has the rest of each row.
KERNEL = (4, 2)
WEIGHTS = ("kernel", "bias")


@functools.cache
def arrays():
    with np.load(_FOLDER / "tensorflow.npz") as file:
        return dict(file)


def split(rows):
    """Rows of twelve numbers as a tree of parameters."""
    size = np.prod(KERNEL)
    return {
        "kernel": rows[..., :size].reshape(*rows.shape[:-1], *KERNEL),
        "bias": rows[..., size:],
    }


def join(tree):
    """The inverse of `split`."""
    kernel, bias = tree["kernel"], tree["bias"]
    numpy = jnp if isinstance(bias, jax.Array) else np
    return numpy.concatenate([kernel.reshape(*bias.shape[:-1], -1), bias], axis=-1)


def learning_rate(case):
    """The learning rate of a recorded case, as a number or schedule."""
    recorded = case["learning_rate"]
    if recorded == "changing":
        rates = jnp.asarray(arrays()[f"rates/{case['steps']}"])
        return lambda count: rates[count]
    if recorded == "exponential":
        return optax.exponential_decay(1e-2, 10, 0.5)
    return recorded


def run(tx, params, state, gradients):
    """The parameters after every step, as rows, and the last state."""
    history = running.run(tx, split(gradients), params, state, "scan")
    return join(history.params), history.last[1]


def slots_of(state):
    """A state in TensorFlow's terms: rows by the names of slots."""
    fields = {k: v for part in state for k, v in part._asdict().items()}
    if "variance" in fields:
        mean = join(fields["mu"])
        slots = {"rms": join(fields["variance"]) + mean**2, "mg": mean}
    else:
        slots = {"rms": join(fields["nu"])}
    if "trace" in fields:
        slots["momentum"] = -join(fields["trace"])
    return slots


def assert_slots_agree(slots, expected, bound):
    """Compare every slot with its own scale: the root mean square for the mean."""
    # A mean square that decays from 1 stalls where TensorFlow flushes the increment.
    rms = expected["rms"] + np.finfo(np.float32).tiny / (0.01 * bound)
    scales = {
        "rms": rms,
        "mg": np.sqrt(rms),
        "momentum": np.max(np.abs(expected.get("momentum", 0))),
    }
    for name, slot in slots.items():
        worst = np.max(np.abs(slot - expected[name]) / scales[name])
        assert worst <= bound, (name, worst)
