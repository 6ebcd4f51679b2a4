# SPDX-License-Identifier: Apache-2.0
"""`dialects.tensorflow` against trajectories and checkpoints that TensorFlow recorded.

``python tests/dialects/tensorflow/record_tensorflow.py`` records them anew.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers import tensorflow_golden as golden
from helpers.comparison import assert_same_bits
from helpers.trajectory import rounding_bound

from optax_rms.dialects import tensorflow
from optax_rms.dialects._shared import clipping

# The worst difference that counts as agreement, relative to the length of the path, and
# the least that counts as disagreement.
BOUND = 2e-5
REJECTED = 100 * BOUND

CASES = {k: v for k, v in golden.HEADER["cases"].items() if "not_a_number" not in k}


def transformation(case, **changes):
    arguments = {"learning_rate": golden.learning_rate(case), **case["arguments"]}
    if arguments.get("momentum") == "tensor":
        arguments["momentum"] = jnp.array(0.0)
    return getattr(tensorflow, case["dialect"])(**{**arguments, **changes})


def run(case, tx, gradients=None):
    params = golden.split(jnp.zeros(12))
    if gradients is None:
        gradients = golden.arrays()[case["gradients"]]
    return golden.run(tx, params, tx.init(params), gradients)


def error(name, trajectory):
    expected = golden.arrays()[f"{name}/params"].astype(np.float64)
    return reference.relative_error(trajectory, expected)


@pytest.mark.parametrize("name", CASES)
def test_trajectory_and_state(name):
    case = CASES[name]
    trajectory, state = run(case, transformation(case))
    assert error(name, trajectory) <= BOUND
    slots = golden.slots_of(state)
    expected = {slot: golden.arrays()[f"{name}/{slot}"] for slot in slots}
    golden.assert_slots_agree(slots, expected, BOUND)


def in_reference(case):
    """The arguments of `reference.rmsprop` for a case, and the name of its dialect."""
    arguments = dict(case["arguments"])
    if arguments.get("momentum") == "tensor":
        arguments["momentum"] = 0.0
    rate = golden.learning_rate(case)
    counts = np.arange(case["steps"])
    rates = np.array([rate(t) for t in counts] if callable(rate) else rate, np.float64)
    settings = {
        "centered": arguments.get("centered", False),
        "momentum": arguments.get("momentum", 0.0),
    }
    if case["dialect"] == "rmsprop":
        settings["learning_rate"] = rates
        settings["decay"] = arguments.get("decay", 0.9)
        settings["eps"] = arguments.get("epsilon", 1e-10)
        return settings, "tensorflow"
    settings["learning_rate"] = rates / (1 + arguments.get("decay", 0.0) * counts)
    settings["decay"] = arguments.get("rho", 0.9)
    settings["eps"] = arguments.get("epsilon") or 1e-7
    has_kernel = "momentum" in case["arguments"]
    return settings, "optax" if has_kernel else "eps_outside_lr_inside"


def differs(settings, own, other):
    """Whether two dialects differ with these settings."""
    own, other = reference.DIALECTS[own], reference.DIALECTS[other]
    is_constant = np.unique(settings["learning_rate"]).size == 1
    if settings["momentum"] and not is_constant:
        return own != other
    return own | {"lr_in_momentum": None} != other | {"lr_in_momentum": None}


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "clip" not in str(case)]
)
def test_the_data_reject_every_other_dialect(name):
    settings, own = in_reference(CASES[name])
    gradients = golden.arrays()[CASES[name]["gradients"]]
    errors = {
        dialect: error(name, reference.rmsprop(gradients, **settings, **differences))
        for dialect, differences in reference.DIALECTS.items()
    }
    assert errors[own] <= BOUND
    others = [dialect for dialect in errors if differs(settings, own, dialect)]
    assert len(others) == (5 if "momentum_changing" in name else len(others))
    assert min(errors[dialect] for dialect in others) >= REJECTED, errors


NEIGHBOURS = {
    "rmsprop": {"decay": 0.94, "momentum": 0.79, "epsilon": 2e-2},
    "legacy_keras_rmsprop": {
        "rho": 0.94,
        "momentum": 0.79,
        "epsilon": 2e-2,
        "decay": 0.02,
        "clipvalue": 4.0,
        "global_clipnorm": 5.0,
    },
}


@pytest.mark.parametrize("dialect", NEIGHBOURS)
def test_the_data_reject_every_other_argument(dialect):
    name = f"{dialect}/everything"
    case = CASES[name]
    arguments = {k: case["arguments"][k] for k in NEIGHBOURS[dialect]}

    @jax.jit
    def trajectory(arguments):
        return run(case, transformation(case, **arguments))[0]

    def error_of(**changes):
        traced = jax.tree.map(jnp.float32, arguments | changes)
        return error(name, trajectory(traced))

    assert error_of() <= BOUND
    for argument, value in NEIGHBOURS[dialect].items():
        assert error_of(**{argument: value}) >= REJECTED, argument
    not_centered, _ = run(case, transformation(case, centered=False))
    assert error(name, not_centered) >= REJECTED


def test_the_data_reject_clipping_in_another_order():
    name = "legacy_keras_rmsprop/clipvalue_and_clipnorm"
    gradients = golden.split(golden.arrays()[CASES[name]["gradients"]])
    steps = [
        (clipping.clip_by_value, CASES[name]["arguments"]["clipvalue"]),
        (clipping.clip_by_norm, CASES[name]["arguments"]["clipnorm"]),
    ]

    def clipped(steps):
        def clip(row):
            for step, limit in steps:
                row = step(row, limit)
            return row

        return golden.join(jax.vmap(clip)(jax.tree.map(jnp.asarray, gradients)))

    tx = tensorflow.legacy_keras_rmsprop(1e-2)
    assert error(name, run(CASES[name], tx, clipped(steps))[0]) <= BOUND
    assert error(name, run(CASES[name], tx, clipped(steps[::-1]))[0]) >= REJECTED


def test_finite_where_centered_tensorflow_is_not():
    name = "legacy_keras_rmsprop/not_a_number"
    case = golden.HEADER["cases"][name]
    recorded = golden.arrays()[f"{name}/params"]
    assert np.isnan(recorded[-1]).any()
    ours, _ = run(case, transformation(case))
    settings, own = in_reference(case)
    gradients = golden.arrays()[case["gradients"]]
    expected = reference.rmsprop(gradients, **settings, **reference.DIALECTS[own])
    bound = rounding_bound(np.float32, case["steps"])
    assert reference.relative_error(ours, expected) <= bound
    # Until the variance is a hundredth of the mean square, TensorFlow is right, too.
    early = slice(int(np.log(1e-2) / np.log(settings["decay"])))
    assert reference.relative_error(recorded[early], expected[early]) <= BOUND


class Checkpoint:
    """A recorded checkpoint after some steps, and how to read it."""

    def __init__(self, name, step):
        self.case = golden.HEADER["checkpoints"][name]
        self.is_graph = name.startswith("checkpoint/graph")
        prefix = f"{name}/{step}/"
        self.variables = {
            key.removeprefix(prefix): value
            for key, value in golden.arrays().items()
            if key.startswith(prefix)
        }
        self.params = jax.tree.map(jnp.asarray, self.convert(self.variables))
        # Only a graph and legacy Keras count their steps themselves.
        counts = self.is_graph or "legacy" in self.case["dialect"]
        self.step = None if counts else step

    def name_of(self, weight, slot=None):
        if not self.is_graph:
            slot = f"/.OPTIMIZER_SLOT/optimizer/{slot}" if slot else ""
            return f"model/dense/{weight}{slot}/.ATTRIBUTES/VARIABLE_VALUE"
        is_centered = self.case["arguments"].get("centered")
        numbers = {"rms": "/RMSProp", "momentum": "/RMSProp_1"}
        if is_centered:
            numbers |= {"mg": "/RMSProp_1", "momentum": "/RMSProp_2"}
        return f"dense/{weight}{numbers[slot] if slot else ''}"

    def convert(self, variables):
        return {weight: variables[self.name_of(weight)] for weight in golden.WEIGHTS}

    def convert_back(self, tree):
        return {self.name_of(weight): tree[weight] for weight in golden.WEIGHTS}

    def slots(self):
        """Rows by TensorFlow's names, without a momentum that has no effect."""
        slots = ["rms"] + [
            s for s in ("mg", "momentum") if USES[s] in self.case["arguments"]
        ]
        return {
            slot: golden.join(
                {w: self.variables[self.name_of(w, slot)] for w in golden.WEIGHTS}
            )
            for slot in slots
        }

    def import_state(self, variables):
        return tensorflow.import_state(
            variables,
            self.convert,
            dialect=getattr(tensorflow, self.case["dialect"]),
            step=self.step,
            learning_rate=golden.learning_rate(self.case),
            **self.case["arguments"],
        )


USES = {"mg": "centered", "momentum": "momentum"}


def assert_arrived(trajectory, start, checkpoint):
    """The last parameters are those of the checkpoint, within the bound."""
    start, expected = (golden.join(params) for params in (start, checkpoint.params))
    path = np.abs(np.diff(trajectory, axis=0, prepend=start[None])).sum(axis=0)
    assert np.all(np.abs(trajectory[-1] - expected) <= BOUND * path)


@pytest.mark.parametrize("name", golden.HEADER["checkpoints"])
def test_a_run_handed_over_and_back(name):
    first, second, third = (Checkpoint(name, step) for step in (25, 50, 75))
    gradients = golden.arrays()[first.case["gradients"]]

    tx, state = first.import_state(first.variables)
    trajectory, state = golden.run(tx, first.params, state, gradients[25:50])
    assert_arrived(trajectory, first.params, second)
    golden.assert_slots_agree(golden.slots_of(state), second.slots(), BOUND)

    exported = tensorflow.export_state(state, first.convert_back, first.variables)
    names = {k for k in first.variables if "OPTIMIZER_SLOT" in k or "RMSProp" in k}
    names |= {k for k in first.variables if "global_step" in k or "/iter/" in k}
    assert exported.keys() == names
    for key, array in exported.items():
        assert array.shape == second.variables[key].shape
        assert array.dtype == second.variables[key].dtype
        if array.dtype == np.int64:
            assert array == second.variables[key] == 50

    # From here on, this stands in for TensorFlow, with only what was exported to it.
    params = jax.tree.map(jnp.asarray, golden.split(trajectory[-1]))
    tx, state = second.import_state(second.variables | exported)
    trajectory, state = golden.run(tx, params, state, gradients[50:])
    assert_arrived(trajectory, params, third)
    golden.assert_slots_agree(golden.slots_of(state), third.slots(), BOUND)


@pytest.mark.parametrize("name", golden.HEADER["checkpoints"])
def test_export_and_import_change_no_bit(name):
    checkpoint = Checkpoint(name, 25)
    _, state = checkpoint.import_state(checkpoint.variables)
    exported = tensorflow.export_state(
        state, checkpoint.convert_back, checkpoint.variables
    )
    _, again = checkpoint.import_state(checkpoint.variables | exported)
    chex.assert_trees_all_equal_structs(again, state)
    assert_same_bits(again, state)
