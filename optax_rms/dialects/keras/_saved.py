# SPDX-License-Identifier: Apache-2.0
"""Variables and configuration of an RMSprop of Keras, read and checked.

Keras 3 and tf.keras from 2.11 on store the same numbers, and differ in three places:

* ``get_config`` of tf.keras has the keys ``is_legacy_optimizer`` and ``jit_compile``,
  by which it is recognised.
* The learning rate is among the variables of Keras 3 only, unless it is a schedule.
* Names, for example of the slot ``velocity`` of ``dense/kernel``, are
  ``dense_kernel_velocity`` in Keras 3 and ``velocity/dense/kernel:0`` in tf.keras.
"""

import collections
import inspect
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_rms.dialects._shared import keras_files, reading
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects.keras import _optimizers as optimizer
from optax_rms.dialects.keras import _schedules as schedules

Names = Sequence[str] | Mapping[str, Any]

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(optimizer.rmsprop).parameters.items()
    if name != "exclude_from_weight_decay"
}

# tf.keras does not have the last two, nor had the first versions of Keras 3.
_OPTIONAL_KEYS = {"name", "loss_scale_factor", "gradient_accumulation_steps"}
_TF_KERAS_KEYS = {"is_legacy_optimizer", "jit_compile"}

# For each of these, 0 means None to Keras.
_CLIPPING = {"clipnorm", "clipvalue", "global_clipnorm"}
_PERIODS = {"ema_overwrite_frequency", "gradient_accumulation_steps"}

# In Keras' order.
_SLOTS = ["average", "gradient_accumulator", "velocity", "momentum", "average_gradient"]

# The variables of a LossScaleOptimizer of Keras 3, before those of its inner optimizer.
_LOSS_SCALE_VARIABLES = ["iteration", "learning_rate", "step_counter", "dynamic_scale"]
_LOSS_SCALE_CLASSES = {"LossScaleOptimizer", "LossScaleOptimizerV3"}


class Saved(NamedTuple):
    """An optimizer of Keras; all of it is checked, except for numbers in its arrays.

    Attributes:
      settings: arguments of the dialect's function, without a learning rate that is
        among the scalars.
      scalars: ``iteration`` and, in Keras 3 without a schedule, ``learning_rate``.
      names: the trainable variables, in Keras' order.
      slots: arrays by Keras' name of the slot and by trainable variable.
      excluded: trainable variables without weight decay.
    """

    settings: dict[str, Any]
    scalars: dict[str, Any]
    names: list[str]
    slots: dict[str, dict[str, Any]]
    excluded: set[str]


class _Found(NamedTuple):
    """The parts of a source, before they are checked against each other.

    Attributes:
      config: from ``get_config`` or ``serialize``, or ``None``.
      values: the arrays, in Keras' order.
      names: their names; empty where Keras stores by position only.
      excluded: for each parameter, whether it has no weight decay, if that is known.
    """

    config: Any
    values: list[Any]
    names: list[str]
    excluded: list[bool]


def read(
    source: Any,
    names: Names | None,
    config: Mapping[str, Any] | None,
    learning_rate: Any = None,
) -> Saved:
    """Read an optimizer, and raise one ``ValueError`` with everything wrong in it."""
    found = _open(source)
    problems = Problems("the Keras optimizer cannot be used")
    class_name, config = _inner_config(problems, config or found.config)
    settings, scalars = _read_config(problems, config, learning_rate)
    variable_names = [_name_in_keras_3(name) for name in found.names]
    own_names = [
        name.removesuffix("_velocity")
        for name in variable_names
        if name.endswith("_velocity")
    ]
    given = _read_names(problems, names, own_names, is_named=bool(found.names))
    problems.raise_any()

    slots = _slots(settings)
    count = len(scalars) + len(slots) * len(given)
    first = _first_variable(found, class_name, count)
    values, variable_names = found.values[first:], variable_names[first:]
    expected = scalars + [f"{name}_{slot}" for slot in slots for name in own_names]
    for i, (name, other) in enumerate(zip(variable_names, expected, strict=False)):
        if name != other:
            problems.add(f"variable {i} must be {other!r}, got {name!r}")
    if not given:
        problems.add("there are no trainable variables. Is the optimizer built?")
    if len(values) != count:
        problems.add(
            f"there are {len(values)} variables, but {count} belong to the "
            f"configuration: {', '.join(scalars)}, and {', '.join(slots)} of each of "
            f"{len(given)} trainable variables, {given}. Is the optimizer built?"
        )
    problems.raise_any()
    remaining = iter(values)
    return Saved(
        settings,
        {scalar: next(remaining) for scalar in scalars},
        given,
        {slot: {name: next(remaining) for name in given} for slot in slots},
        {name for name, out in zip(given, found.excluded, strict=False) if out},
    )


def _slots(settings: Mapping[str, Any]) -> list[str]:
    """The slots that Keras has for these settings."""
    exist = {
        "average": settings["use_ema"],
        "gradient_accumulator": settings["gradient_accumulation_steps"],
        "velocity": True,
        "momentum": settings["momentum"],
        "average_gradient": settings["centered"],
    }
    return [slot for slot in _SLOTS if exist[slot]]


def _open(source: Any) -> _Found:
    if isinstance(source, (str, os.PathLike)):
        file = keras_files.read(source)
        if file.is_named:
            return _Found(
                file.config, [*file.variables.values()], [*file.variables], []
            )
        return _Found(file.config, _in_order(file.variables), [], [])
    if isinstance(source, Mapping):
        return _Found(None, _in_order(source), [], [])
    config, excluded = None, []
    source = getattr(source, "inner_optimizer", source)
    if hasattr(source, "get_config") and hasattr(source, "variables"):
        config = {"class_name": type(source).__name__, "config": _config_of(source)}
        excluded = _excluded(source)
        source = source.variables
    if not isinstance(source, Sequence):
        raise ValueError(
            "an optimizer of Keras, its variables, or the path of a file that it was "
            f"saved in is needed, got a {type(source).__name__}"
        )
    names = [v.name for v in source if _is_variable(v)]
    return _Found(config, [_value(v) for v in source], names, excluded)


def _is_variable(value: Any) -> bool:
    """Whether a value is a variable of Keras or TensorFlow, and so has a name."""
    return hasattr(value, "path") or hasattr(value, "assign")


def _config_of(source: Any) -> dict[str, Any]:
    try:
        return source.get_config()
    except NotImplementedError:
        # A schedule of a class of the user's need not have a configuration.
        schedule = type(getattr(source, "_learning_rate", None))
        config = {key: getattr(source, key, None) for key in _DEFAULTS}
        return config | {
            "learning_rate": {
                "module": schedule.__module__,
                "class_name": schedule.__name__,
            }
        }


def _value(variable: Any) -> Any:
    """The array in a variable of Keras, on any backend; anything else, as it is."""
    if not (hasattr(variable, "path") or hasattr(variable, "detach")):
        return variable
    dtype = jnp.dtype(str(variable.dtype).removeprefix("torch."))
    return reading.to_numpy(getattr(variable, "value", variable)).astype(dtype)


def _excluded(source: Any) -> list[bool]:
    """Which parameters Keras excludes from decay; there is no public record of it."""
    if not hasattr(source, "_exclude_from_weight_decay"):
        return []
    if not hasattr(source, "_trainable_variables"):
        raise ValueError(
            "the optimizer of tf.keras excludes variables from weight decay, and does "
            "not tell which. Pass optimizer.variables and optimizer.get_config(), and "
            "continue with dialects.keras.rmsprop(..., exclude_from_weight_decay=...), "
            "whose state is the same"
        )
    return [not source._use_weight_decay(v) for v in source._trainable_variables]


def _in_order(values: Mapping[Any, Any]) -> list[Any]:
    keys = [str(i) for i in range(len(values))]
    if set(values) != set(keys):
        raise ValueError(
            f"the {len(keys)} variables of the Keras optimizer must be numbered from "
            f"0, got {sorted(map(str, values))}"
        )
    return [values[key] for key in keys]


def _class_name(serialized: Mapping[str, Any]) -> str:
    """The class of a serialized object; tf.keras marks registered ones ``Custom>``."""
    return str(serialized["class_name"]).removeprefix("Custom>")


def _inner_config(problems: Problems, config: Any) -> tuple[str, Mapping[str, Any]]:
    """The class of the outermost optimizer, and the configuration of the RMSprop."""
    class_name = "RMSprop"
    if isinstance(config, Mapping) and "inner_optimizer" in config:
        config = {"class_name": "LossScaleOptimizer", "config": config}
    if isinstance(config, Mapping) and "class_name" in config:
        class_name = inner_name = _class_name(config)
        config = config.get("config")
        if class_name in _LOSS_SCALE_CLASSES and isinstance(config, Mapping):
            inner = config.get("inner_optimizer") or {"class_name": None}
            inner_name, config = _class_name(inner), inner.get("config")
        if inner_name != "RMSprop":
            problems.add(
                f"the optimizer must be an RMSprop, got {inner_name}. Of a model, pass "
                "model.optimizer"
            )
    if isinstance(config, str) and config.lower() == "rmsprop":
        config = _DEFAULTS
    if not isinstance(config, Mapping):
        lacks = "; the source holds no configuration of its optimizer"
        problems.add(
            "config must be what optimizer.get_config() returned, got "
            f"{config!r}{lacks if config is None else ''}"
        )
        config = {}
    problems.raise_any()
    return class_name, config


def _read_config(
    problems: Problems, config: Mapping[str, Any], learning_rate: Any
) -> tuple[dict[str, Any], list[str]]:
    """The settings, and the names of the scalar variables."""
    if config.get("is_legacy_optimizer") or {"decay", "rho"} <= config.keys():
        problems.add(
            "the optimizer is the legacy RMSprop of tf.keras, whose rule is another; "
            "use dialects.tensorflow"
        )
        problems.raise_any()
    if unknown := config.keys() - _DEFAULTS.keys() - _TF_KERAS_KEYS:
        problems.add(f"the configuration has unknown keys {sorted(unknown)}")
    if missing := _DEFAULTS.keys() - _OPTIONAL_KEYS - config.keys():
        problems.add(f"the configuration lacks {sorted(missing)}")
    problems.raise_any()

    ignored = _TF_KERAS_KEYS | {"name"}
    settings = {key: value for key, value in config.items() if key not in ignored}
    for key in _CLIPPING | _PERIODS:
        settings[key] = settings.get(key) or None
    rate = settings.pop("learning_rate")
    scalars = ["iteration"]
    if isinstance(rate, numbers.Real):
        if not _is_tf_keras(config):
            scalars.append("learning_rate")
        elif learning_rate is None:
            learning_rate = rate
    elif learning_rate is None:
        learning_rate = problems.attempt(schedules.from_config, rate)
    if learning_rate is not None:
        settings["learning_rate"] = learning_rate
    for key, value in settings.items():
        problems.attempt(optimizer.rmsprop, **{key: value})
    return settings, scalars


def _is_tf_keras(config: Mapping[str, Any]) -> bool:
    return not _TF_KERAS_KEYS.isdisjoint(config)


def _first_variable(found: _Found, class_name: str, count: int) -> int:
    """The position after the variables that a LossScaleOptimizer has of its own.

    Without names they show as scalars beyond the ``count`` of the inner optimizer.
    """
    names = [name.rpartition("/")[2] for name in found.names]
    number = len(_LOSS_SCALE_VARIABLES)
    if (last := _LOSS_SCALE_VARIABLES[-1]) in names:
        return names.index(last) + 1
    is_longer = len(found.values) == number + count
    if class_name in _LOSS_SCALE_CLASSES and is_longer and not names:
        # Then comes the iteration of the inner optimizer.
        return number if not any(map(np.ndim, found.values[: number + 1])) else 0
    return 0


def _name_in_keras_3(name: str) -> str:
    """A variable's name in Keras 3, from the names in files and in tf.keras."""
    if not name.endswith(":0"):
        # In files, the name of the optimizer comes first: rmsprop/iteration.
        return name.rpartition("/")[2]
    # The name of the optimizer comes first if training, and not build, made the slots.
    match = re.fullmatch(rf"(?:.*?/)?({'|'.join(_SLOTS)})/(.+):0", name)
    return f"{match[2]}_{match[1]}" if match else name.removesuffix(":0")


def _read_names(
    problems: Problems,
    names: Names | None,
    own_names: list[str],
    is_named: bool,
) -> list[str]:
    if names is None and is_named:
        names = own_names
    if isinstance(names, str) or not isinstance(names, (Sequence, Mapping)):
        problems.add(
            "names must be those of the trainable variables, in the order of the model "
            f"([v.path for v in model.trainable_variables]), got {names!r}"
        )
        return []
    given = list(names)
    if repeated := [n for n, c in collections.Counter(given).items() if c > 1]:
        problems.add(f"names must be different, but {repeated} are repeated")
    plain, own_plain = (
        [str(name).removesuffix(":0").replace("/", "_") for name in group]
        for group in (given, own_names)
    )
    if plain != own_plain and sorted(plain) == sorted(own_plain):
        problems.add(f"names must be in the order of the optimizer, {own_names}")
    return given
