# SPDX-License-Identifier: Apache-2.0
"""Reading and checking checkpoints and files of TensorFlow.

The names of the arrays tell apart which optimizer has written them. With ``@`` for
``/.ATTRIBUTES/VARIABLE_VALUE``, a variable ``kernel`` and a momentum::

    tf.train.Saver                   kernel, kernel/RMSProp, kernel/RMSProp_1
    tf.train.Checkpoint of
      TensorFlow 1's optimizer       kernel@, kernel/.OPTIMIZER_SLOT/optimizer/rms@, ...
      tf.keras before 2.11           the same, and optimizer/iter@, optimizer/rho@, ...
      tf.keras from 2.11 on, Keras 3 kernel@, optimizer/_iterations@,
                                     optimizer/_variables/1@, optimizer/_variables/2@
    .h5 of tf.keras before 2.11      kernel, RMSprop/iter, RMSprop/kernel/rms, ...
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from optax_rms.dialects._shared import keras_files, reading, variances
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects.keras import _schedules as schedules
from optax_rms.dialects.tensorflow._object_graph import variable_names

# How tf.train.Checkpoint ends the names of arrays.
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"

# By variable and by TensorFlow's name of the slot: the name of the array.
Slots = dict[str, dict[str, str]]


class Optimizer(NamedTuple):
    """An optimizer in a checkpoint or file.

    Attributes:
      arrays: all arrays, by name.
      name: its name or path.
      writer: the optimizer that has written it. "unknown" is TensorFlow 1's, or that of
        tf.keras before 2.11 in a checkpoint without its hyperparameters.
      named_slots: where the slots are; ``None`` if the writer only numbers them.
      config: its settings, if it is from a file of Keras.
    """

    arrays: Mapping[str, Any]
    name: str
    writer: Literal["unknown", "legacy Keras", "new Keras"]
    named_slots: Slots | None = None
    config: Mapping[str, Any] | None = None

    def slots(self, centered: bool) -> Slots:
        """Where the slots are; ``centered`` says what the numbers of a Saver mean."""
        if self.named_slots is not None:
            return self.named_slots
        order = ("rms", "mg", "momentum") if centered else ("rms", "momentum")
        slots: Slots = {}
        for name in self.arrays:
            # TensorFlow makes names unique by appending _1, _2 and so on.
            match = re.fullmatch(rf"(.+)/{re.escape(self.name)}(?:_([1-9]\d*))?", name)
            if match:
                number = int(match[2] or 0)
                slot = order[number] if number < len(order) else name
                slots.setdefault(match[1], {})[slot] = name
        return slots

    def step_name(self) -> str | None:
        """The name of the array that counts the steps, if there is one."""
        candidates = (
            f"{self.name}/_iterations{VALUE}",
            f"{self.name}/_variables/0{VALUE}",
            f"{self.name}/iter{VALUE}",
            f"{self.name}/iter",
            "global_step",
            f"global_step{VALUE}",
        )
        return next((name for name in candidates if name in self.arrays), None)


def find_optimizer(source: Any, optimizer: str | None) -> Optimizer:
    """The optimizer of that name, or the only one, in a checkpoint or file."""
    if isinstance(source, (str, os.PathLike)):
        return _from_file(source, optimizer)
    if not isinstance(source, Mapping) or not all(
        isinstance(name, str) for name in source
    ):
        raise ValueError(
            "the variables must be a mapping from names in a checkpoint to arrays, or "
            f"the path of a .h5 file of tf.keras, got {type(source).__name__}"
        )
    slots: dict[str, Slots] = {}
    new = set()
    for name in source:
        match = re.fullmatch(
            rf"(.+)/\.OPTIMIZER_SLOT/(.+)/([^/]+){re.escape(VALUE)}", name
        )
        if match:
            by_variable = slots.setdefault(match[2], {})
            by_variable.setdefault(match[1] + VALUE, {})[match[3]] = name
        if match := re.fullmatch(rf"(.+)/_variables/\d+{re.escape(VALUE)}", name):
            new.add(match[1])
    found = sorted(slots.keys() | new)
    if not found:
        return Optimizer(source, optimizer or "RMSProp", "unknown")
    if optimizer is None and len(found) == 1:
        (optimizer,) = found
    if optimizer is None or optimizer not in found:
        raise ValueError(
            f"optimizer must be one of {found}, which have slots in the checkpoint, "
            f"got {optimizer!r}"
        )
    if optimizer in new:
        return Optimizer(source, optimizer, "new Keras")
    is_legacy = f"{optimizer}/iter{VALUE}" in source
    writer = "legacy Keras" if is_legacy else "unknown"
    return Optimizer(source, optimizer, writer, slots[optimizer])


def _from_file(path: str | os.PathLike[str], optimizer: str | None) -> Optimizer:
    """The optimizer in a ``.h5`` of tf.keras before 2.11."""
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} is no file. A checkpoint is read by TensorFlow: with reader = "
            "tf.train.load_checkpoint(path), pass {name: reader.get_tensor(name) for "
            "name, _ in tf.train.list_variables(path)}"
        )
    saved = keras_files.read(path)
    config: Any = saved.config or {}
    # With mixed_float16, a LossScaleOptimizer is around the optimizer.
    config = config.get("config", {}).get("inner_optimizer") or config
    settings = dict(config.get("config", {}))
    arrays = {key.removesuffix(":0"): array for key, array in saved.variables.items()}
    counts = [key for key in arrays if key.endswith("/iter")]
    if config.get("class_name") != "RMSprop" or len(counts) != 1:
        raise ValueError(
            f"{path} must hold an RMSprop of tf.keras before 2.11, the variables of "
            "which are RMSprop/iter, RMSprop/dense/kernel/rms and so on, got "
            f"{config.get('class_name')!r} with {list(arrays)}. Files of later "
            "versions, and of Keras 3, are imported by dialects.keras.import_state"
        )
    name = counts[0].removesuffix("/iter")
    if optimizer not in (None, name):
        raise ValueError(f"optimizer must be {name!r}, as in {path}, got {optimizer!r}")
    slots: Slots = {}
    for key in arrays:
        if match := re.fullmatch(rf"{re.escape(name)}/(.+)/([^/]+)", key):
            slots.setdefault(match[1], {})[match[2]] = key
    # In place of the variables, which have the same shapes and dtypes.
    variables = {v: arrays[keys["rms"]] for v, keys in slots.items() if "rms" in keys}
    return Optimizer(variables | arrays, name, "legacy Keras", slots, settings)


class KerasVariables(NamedTuple):
    """The variables of an optimizer of tf.keras from 2.11 on, or of Keras 3.

    Attributes:
      iteration: the name of the array that counts the steps.
      learning_rate: that of the learning rate; ``None`` if it is a schedule.
      is_numbered: whether the learning rate is one of the numbered variables.
      slots: the names of all other arrays, in the order of the optimizer.
      kinds: the slots that each trained variable has, in order; ``None`` if the object
        graph is missing.
      variables: the names of the trained variables, in order; ``None`` if the object
        graph is missing, or several have the same name in TensorFlow.
    """

    iteration: str
    learning_rate: str | None
    is_numbered: bool
    slots: list[str]
    kinds: list[str] | None
    variables: list[str] | None


# The name of a slot in TensorFlow: "velocity/hidden/kernel" or, of older versions,
# "RMSprop/velocity/hidden/kernel" in tf.keras, "rmsprop/hidden_kernel_velocity" in
# Keras 3, in which every slash of the variable is replaced.
_KINDS = "average|gradient_accumulator|velocity|momentum|average_gradient"
_LABELS = (
    re.compile(rf"(?:.*?/)?(?P<kind>{_KINDS})/(?P<variable>.+)"),
    re.compile(rf"(?:.*/)?(?P<variable>.+?)_(?P<kind>{_KINDS})"),
)


def read_keras_variables(optimizer: Optimizer) -> KerasVariables:
    """Order the variables of an optimizer, and find out what they belong to."""
    pattern = rf"{re.escape(optimizer.name)}/_variables/(\d+){re.escape(VALUE)}"
    numbered = {
        int(match[1]): name
        for name in optimizer.arrays
        if (match := re.fullmatch(pattern, name))
    }
    rate = f"{optimizer.name}/_learning_rate{VALUE}"
    has_rate = rate in optimizer.arrays
    # The iteration is number 0, and in Keras 3 the learning rate number 1. TensorFlow
    # stores every array once, these two under names of their own.
    numbers = sorted(numbered.keys() - {0})
    is_numbered = has_rate and 1 not in numbered
    first = 2 if is_numbered else 1
    iteration = optimizer.step_name()
    if numbers != list(range(first, first + len(numbers))) or iteration is None:
        raise ValueError(
            f"{optimizer.name}/_variables must be numbered from {first} on, beside "
            f"{optimizer.name}/_iterations, got the numbers {numbers}"
        )
    slots = [numbered[number] for number in numbers]
    kinds, variables = _read_labels(optimizer.arrays, slots)
    return KerasVariables(
        iteration, rate if has_rate else None, is_numbered, slots, kinds, variables
    )


def _read_labels(
    arrays: Mapping[str, Any], slots: list[str]
) -> tuple[list[str] | None, list[str] | None]:
    """The kinds of slots, and the trained variables, by the object graph."""
    labels = variable_names(arrays)
    found = [x for name in slots if (x := _read_label(labels.get(name, "")))]
    if len(found) < len(slots):
        return None, None
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    trained = [variable for kind, variable in found if kind == "velocity"]
    if found != [(kind, variable) for kind in kinds for variable in trained]:
        raise ValueError(
            "every trained variable must have the same slots, in the same order, got "
            f"{[labels[name] for name in slots]}"
        )
    keys: dict[str, list[str]] = {}
    for key, label in labels.items():
        if key in arrays and key not in slots:
            keys.setdefault(label, []).append(key)
            keys.setdefault(label.replace("/", "_"), []).append(key)
    candidates = [sorted(set(keys.get(variable, []))) for variable in trained]
    if any(len(names) != 1 for names in candidates):
        return kinds, None
    return kinds, [names[0] for names in candidates]


def _read_label(label: str) -> tuple[str, str] | None:
    for pattern in _LABELS:
        if match := pattern.fullmatch(label):
            return match["kind"], match["variable"]
    return None


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
            f"'kernel/.OPTIMIZER_SLOT/optimizer/rms{VALUE}', or, of tf.keras from 2.11 "
            f"on, 'optimizer/_variables/1{VALUE}'"
        )
    for variable, names in slots.items():
        if missing := expected - names.keys():
            problems.add(f"{variable} has no slot for {', '.join(sorted(missing))}")
        if left_over := names.keys() - expected:
            keys = ", ".join(names[slot] for slot in sorted(left_over))
            problems.add(
                f"nothing needs {keys}; do centered and momentum agree with the "
                "optimizer that has written the checkpoint?"
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


def check_variances(
    problems: Problems, slots: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """A mean square is at least the squared mean, but for the rounding."""
    for variable, arrays in slots.items():
        if "mg" in arrays and variances.is_less_than_square(
            arrays["rms"], arrays["mg"]
        ):
            problems.add(
                f"{variable} has a slot rms that is much less than the square of its "
                "slot mg; have slots been swapped?"
            )


def check_like(name: str, optimizer: Optimizer, array: np.ndarray) -> None:
    """Raise a ``ValueError`` if an array has not the shape and dtype of ``name``."""
    expected = reading.describe(reading.to_numpy(optimizer.arrays[name]))
    got = reading.describe(reading.to_numpy(array))
    if got != expected:
        raise ValueError(f"{name} must be {expected}, got {got}")


def read_step(optimizer: Optimizer, step: Any | None) -> int:
    """The number of steps: as given, or as stored."""
    if step is not None:
        return reading.read_count("step", step)
    name = optimizer.step_name()
    if name is None:
        raise ValueError(
            "the learning rate is a schedule, and the checkpoint has no global_step; "
            "pass the number of steps taken as `step`"
        )
    return reading.read_count(name, optimizer.arrays[name])


def read_hyperparameters(
    problems: Problems, optimizer: Optimizer, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of the dialect: ``given``, and stored ones in place of others."""
    if optimizer.config is not None:
        stored = {k: v for k, v in optimizer.config.items() if k != "name"}
        if isinstance(rate := stored.get("learning_rate"), Mapping):
            del stored["learning_rate"]
            if "learning_rate" not in given:
                stored["learning_rate"] = problems.attempt(schedules.from_config, rate)
    else:
        names = {
            key: f"{optimizer.name}/{key}{VALUE}"
            for key in ("learning_rate", "decay", "rho", "momentum")
        }
        stored = {
            key: problems.attempt(reading.read_number, name, optimizer.arrays[name])
            for key, name in names.items()
            if name in optimizer.arrays
        }
    if "learning_rate" not in stored | dict(given):
        problems.add(
            "learning_rate was a schedule, which is not stored; pass it"
            if optimizer.writer == "legacy Keras"
            else "learning_rate is not stored in the checkpoint; pass it"
        )
    return stored | dict(given)
