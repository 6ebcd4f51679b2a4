# SPDX-License-Identifier: Apache-2.0
"""Reading the variables and the configuration of a Keras RMSprop, with suspicion."""

import collections
import inspect
import io
import json
import numbers
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_rms.dialects._shared import reading
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects.keras import _optimizers as optimizer
from optax_rms.dialects.keras import _schedules as schedules

Names = Sequence[str] | Mapping[str, Any]

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(optimizer.rmsprop).parameters.items()
    if name != "exclude_from_weight_decay"
}

# The first versions of Keras 3 did not have the last two.
_OPTIONAL_KEYS = {"name", "loss_scale_factor", "gradient_accumulation_steps"}

# In these, 0 means None to Keras.
_CLIPPING = {"clipnorm", "clipvalue", "global_clipnorm"}
_PERIODS = {"ema_overwrite_frequency", "gradient_accumulation_steps"}


class Saved(NamedTuple):
    """An optimizer of Keras, in which nothing was found wrong apart from its numbers.

    Attributes:
      settings: arguments of the dialect's function, without a constant learning rate.
      scalars: ``iteration`` and, unless there is a schedule, ``learning_rate``.
      slots: arrays by Keras' name of the slot and by parameter, in Keras' order.
      excluded: parameters without weight decay.
    """

    settings: dict[str, Any]
    scalars: dict[str, Any]
    slots: dict[str, dict[str, Any]]
    excluded: set[str]


class _Found(NamedTuple):
    """What a source holds.

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
    """Read an optimizer. All that is wrong with it goes into one ``ValueError``."""
    found = _open(source)
    problems = Problems("the Keras optimizer cannot be used")
    settings, scalars = _read_config(problems, config or found.config, learning_rate)
    own_names = [n[: -len("_velocity")] for n in found.names if n.endswith("_velocity")]
    given = _read_names(problems, names, own_names, is_named=bool(found.names))
    problems.raise_any()

    slots = [
        slot
        for slot, exists in {
            "average": settings["use_ema"],
            "gradient_accumulator": settings["gradient_accumulation_steps"],
            "velocity": True,
            "momentum": settings["momentum"],
            "average_gradient": settings["centered"],
        }.items()
        if exists
    ]
    expected = scalars + [f"{name}_{slot}" for slot in slots for name in own_names]
    for i, (name, other) in enumerate(zip(found.names, expected, strict=False)):
        if name != other:
            problems.add(f"variable {i} must be {other!r}, got {name!r}")
    if not given:
        problems.add("there are no trainable variables. Is the optimizer built?")
    count = len(scalars) + len(slots) * len(given)
    if len(found.values) != count:
        problems.add(
            f"there are {len(found.values)} variables, but {count} belong to the "
            f"configuration: {', '.join(scalars)}, and {', '.join(slots)} of each of "
            f"{len(given)} trainable variables, {given}. Is the optimizer built?"
        )
    problems.raise_any()
    values = iter(found.values)
    return Saved(
        settings,
        {scalar: next(values) for scalar in scalars},
        {slot: {name: next(values) for name in given} for slot in slots},
        {name for name, out in zip(given, found.excluded, strict=False) if out},
    )


def _open(source: Any) -> _Found:
    if isinstance(source, (str, os.PathLike)):
        config, values = _open_file(source)
        return _Found(config, _in_order(values), [], [])
    if isinstance(source, Mapping):
        return _Found(None, _in_order(source), [], [])
    config, excluded = None, []
    if hasattr(source, "get_config") and hasattr(source, "variables"):
        config = {"class_name": type(source).__name__, "config": _config_of(source)}
        excluded = _excluded(source)
        source = source.variables
    if not isinstance(source, Sequence):
        raise ValueError(
            "an optimizer of Keras, its variables, or the path of a file that it was "
            f"saved in is needed, got a {type(source).__name__}"
        )
    names = [v.name for v in source if hasattr(v, "path")]
    return _Found(config, [_value(v) for v in source], names, excluded)


def _config_of(source: Any) -> dict[str, Any]:
    try:
        return source.get_config()
    except NotImplementedError:
        # A schedule of the user's own need not have a configuration.
        config = {key: getattr(source, key, None) for key in _DEFAULTS}
        return config | {"learning_rate": None}


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
    return [not source._use_weight_decay(v) for v in source._trainable_variables]


def _open_file(path: str | os.PathLike[str]) -> tuple[Any, dict[str, np.ndarray]]:
    """The configuration, if there is one, and the variables by position."""
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
            group: Any = file.get("optimizer/vars", {})
            values = {key: _read_dataset(data) for key, data in group.items()}
    except Exception as error:  # Each kind of damage has its own exception.
        raise ValueError(f"{path} is damaged, or no file of Keras: {error}") from error
    if not values:
        raise ValueError(
            f"{path} holds no optimizer. Compile the model, and train it or build its "
            "optimizer, before saving it."
        )
    return config, values


def _read_dataset(data: Any) -> np.ndarray:
    array = data[()]
    # HDF5 has no bfloat16; Keras leaves a note beside the bytes.
    return array.view(jnp.bfloat16) if data.attrs.get("dtype") == "bfloat16" else array


def _in_order(values: Mapping[Any, Any]) -> list[Any]:
    keys = [str(i) for i in range(len(values))]
    if set(values) != set(keys):
        raise ValueError(
            f"the {len(keys)} variables of the Keras optimizer must be numbered from "
            f"0, got {sorted(map(str, values))}"
        )
    return [values[key] for key in keys]


def _read_config(
    problems: Problems, config: Any, learning_rate: Any
) -> tuple[dict[str, Any], list[str]]:
    """The settings, and the names of the scalar variables."""
    if isinstance(config, Mapping) and "class_name" in config:
        if config["class_name"] != "RMSprop":
            problems.add(
                f"the optimizer must be an RMSprop, got {config['class_name']}. Of a "
                "model, pass model.optimizer; of a LossScaleOptimizer, inner_optimizer"
            )
        config = config.get("config")
    if isinstance(config, str) and config.lower() == "rmsprop":
        config = _DEFAULTS
    if not isinstance(config, Mapping):
        problems.add(
            f"config must be what optimizer.get_config() returned, got {config!r}"
        )
        config = {}
    problems.raise_any()
    if unknown := config.keys() - _DEFAULTS.keys():
        problems.add(f"the configuration has unknown keys {sorted(unknown)}")
    if missing := _DEFAULTS.keys() - _OPTIONAL_KEYS - config.keys():
        problems.add(f"the configuration lacks {sorted(missing)}")
    problems.raise_any()

    settings = {key: value for key, value in config.items() if key != "name"}
    for key in _CLIPPING | _PERIODS:
        settings[key] = settings.get(key) or None
    rate = settings.pop("learning_rate")
    scalars = ["iteration"]
    if isinstance(rate, numbers.Real):
        scalars.append("learning_rate")
    elif learning_rate is None:
        learning_rate = problems.attempt(schedules.from_config, rate)
    if learning_rate is not None:
        settings["learning_rate"] = learning_rate
    for key, value in settings.items():
        problems.attempt(optimizer.rmsprop, **{key: value})
    return settings, scalars


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
    plain = [str(name).replace("/", "_") for name in given]
    if plain != own_names and sorted(plain) == sorted(own_names):
        problems.add(f"names must be in the order of the optimizer, {own_names}")
    return given
