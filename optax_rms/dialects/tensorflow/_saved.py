# SPDX-License-Identifier: Apache-2.0
"""The names and arrays in a checkpoint of TensorFlow, read with suspicion."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from optax_rms.dialects._shared import reading, variances
from optax_rms.dialects._shared.problems import Problems

# How tf.train.Checkpoint ends the names of what is stored.
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"

Slots = dict[str, dict[str, str]]


class Optimizer(NamedTuple):
    """An optimizer in a checkpoint.

    Attributes:
      name: its name or path in the checkpoint.
      named_slots: what its slots are called in the checkpoint, by variable and slot;
        ``None`` in a checkpoint of ``tf.train.Saver``, which only numbers them.
    """

    name: str
    named_slots: Slots | None

    def slots(self, variables: Mapping[str, Any], centered: bool) -> Slots:
        """What its slots are called; ``centered`` says what the numbers mean."""
        if self.named_slots is not None:
            return self.named_slots
        order = ("rms", "mg", "momentum") if centered else ("rms", "momentum")
        slots = {}
        for name in variables:
            # TensorFlow makes names unique by appending _1, _2 and so on.
            match = re.fullmatch(rf"(.+)/{re.escape(self.name)}(?:_([1-9]\d*))?", name)
            if match:
                number = int(match[2] or 0)
                slot = order[number] if number < len(order) else name
                slots.setdefault(match[1], {})[slot] = name
        return slots


def find_optimizer(variables: Mapping[str, Any], optimizer: str | None) -> Optimizer:
    """The optimizer of that name, or the only one."""
    if not isinstance(variables, Mapping) or not all(
        isinstance(name, str) for name in variables
    ):
        raise ValueError(
            "the variables must be a mapping from names in a checkpoint to arrays, got "
            f"{type(variables).__name__}"
        )
    slots = {}
    for name in variables:
        match = re.fullmatch(
            rf"(.+)/\.OPTIMIZER_SLOT/(.+)/([^/]+){re.escape(VALUE)}", name
        )
        if match:
            by_variable = slots.setdefault(match[2], {})
            by_variable.setdefault(match[1] + VALUE, {})[match[3]] = name
    if not slots:
        return Optimizer(optimizer or "RMSProp", None)
    if optimizer is None and len(slots) == 1:
        (optimizer,) = slots
    if optimizer is None or optimizer not in slots:
        raise ValueError(
            f"optimizer must be one of {sorted(slots)}, which have slots in the "
            f"checkpoint, got {optimizer!r}"
        )
    return Optimizer(optimizer, slots[optimizer])


def check_slots(
    problems: Problems,
    optimizer: Optimizer,
    slots: Slots,
    expected: Iterable[str],
) -> None:
    """Every variable that has slots must have exactly those that are expected."""
    expected = set(expected)
    if not slots:
        problems.add(
            f"no variable has slots of an optimizer called {optimizer.name!r}; their "
            f"names would be like 'kernel/{optimizer.name}', beside 'kernel', or like "
            f"'kernel/.OPTIMIZER_SLOT/optimizer/rms{VALUE}'"
        )
    for variable, names in slots.items():
        if missing := expected - names.keys():
            problems.add(f"{variable} has no slot for {', '.join(sorted(missing))}")
        if left_over := names.keys() - expected:
            keys = ", ".join(names[slot] for slot in sorted(left_over))
            problems.add(
                f"nothing needs {keys}; do centered and momentum agree with what the "
                "checkpoint was written with?"
            )


def read_like(name: str, variables: Mapping[str, Any]) -> np.ndarray:
    """Zeros of the shape of a variable, and of its dtype or float32."""
    if name not in variables:
        raise ValueError(f"{name} is not in the checkpoint")
    array = reading.to_numpy(variables[name])
    if array.dtype.kind != "f":
        hint = ""
        if array.dtype.kind == "c":
            hint = "; TensorFlow averages the square of complex gradients, not |g|^2"
        raise ValueError(f"{name} must be floating-point, got {array.dtype}{hint}")
    return np.zeros_like(array)


def write_slot(name: str, like: Mapping[str, Any], array: np.ndarray) -> np.ndarray:
    """A slot as TensorFlow has it: of the shape and dtype in ``like``."""
    model = np.asarray(like[name])
    expected = reading.describe(reading.to_numpy(model))
    if reading.describe(array) != expected:
        raise ValueError(f"{name} must be {expected}, got {reading.describe(array)}")
    return array.astype(model.dtype)


def check_variances(
    problems: Problems,
    mean_square: Mapping[str, np.ndarray],
    mean: Mapping[str, np.ndarray],
) -> None:
    """A mean square is at least the squared mean, but for the rounding."""
    for variable, squares in mean_square.items():
        if variances.is_less_than_square(squares, mean[variable]):
            problems.add(
                f"{variable} has a slot rms that is much less than the square of its "
                "slot mg; have slots been swapped?"
            )


def step_name(variables: Mapping[str, Any], optimizer: Optimizer) -> str | None:
    """The name of the variable that counts the steps, if there is one."""
    names = (f"{optimizer.name}/iter{VALUE}", "global_step", f"global_step{VALUE}")
    return next((name for name in names if name in variables), None)


def read_step(
    variables: Mapping[str, Any], optimizer: Optimizer, step: Any | None
) -> int:
    """The number of steps: as given, or as stored."""
    if step is not None:
        return reading.read_count("step", step)
    name = step_name(variables, optimizer)
    if name is None:
        raise ValueError(
            "the learning rate is a schedule, and the checkpoint has no global_step; "
            "pass the number of steps taken as `step`"
        )
    return reading.read_count(name, variables[name])


def read_hyperparameters(
    problems: Problems, variables: Mapping[str, Any], optimizer: Optimizer
) -> dict[str, Any]:
    """What ``tf.train.Checkpoint`` holds of the optimizers of legacy Keras."""
    names = {
        key: f"{optimizer.name}/{key}{VALUE}"
        for key in ("learning_rate", "decay", "rho", "momentum")
    }
    return {
        key: problems.attempt(reading.read_number, name, variables[name])
        for key, name in names.items()
        if name in variables
    }
