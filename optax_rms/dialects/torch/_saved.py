# SPDX-License-Identifier: Apache-2.0
"""Reading the state dict of a PyTorch RMSprop, with suspicion."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_rms import _checks as checks
from optax_rms.dialects._shared import reading
from optax_rms.dialects._shared.problems import Problems

Names = Sequence[str] | Mapping[str, Any]

_HINT = "It must be what the state_dict() of an RMSprop optimizer returned."

# Keys of a group that PyTorch, timm and their schedulers have, but no step needs.
_IGNORED = {
    *("params", "param_names", "capturable", "foreach", "differentiable", "name"),
    *("initial_lr", "lr_scale", "max_lr", "min_lr", "base_momentum", "max_momentum"),
}


class Parameter(NamedTuple):
    """What a state dict says about one parameter.

    Attributes:
      key: its key in the state dict.
      group: the position of its group.
      step: the number of its steps.
      slots: NumPy arrays by PyTorch's names; empty if the parameter had no step yet.
      stored: the slots and the step as they are in the state dict.
      template: an array of its shape, dtype and framework; ``None`` if unknown.
    """

    key: Any
    group: int
    step: int
    slots: dict[str, np.ndarray]
    stored: Mapping[str, Any]
    template: Any


class StateDict(NamedTuple):
    """A state dict in which nothing was found wrong.

    Attributes:
      is_timm: whether it is of timm's RMSpropTF.
      groups: for each group, the arguments of the dialect's function.
      param_groups: the groups as they are in the state dict.
      parameters: by name, in the order in which the optimizer has them.
    """

    is_timm: bool
    groups: list[dict[str, Any]]
    param_groups: list[dict[str, Any]]
    parameters: dict[Any, Parameter]


def read(state_dict: Mapping[str, Any], names: Names | None) -> StateDict:
    """Read a state dict. All that is wrong with it goes into one ``ValueError``."""
    state, groups = _split(state_dict)
    problems = Problems("the state dict cannot be used")
    keys = _read_keys(problems, groups)
    problems.raise_any()
    is_timm = any("lr_in_momentum" in group for group in groups)
    settings = [
        _read_group(problems, f"param_groups[{i}]", group, is_timm)
        for i, group in enumerate(groups)
    ]
    names_by_key = _read_names(problems, names, groups, list(keys))
    by_text = {str(key): key for key in keys}
    stored = {}
    for key, slots in state.items():
        # JSON and safetensors have text where PyTorch has integers.
        key = key if key in keys else by_text.get(key, key)
        if key not in keys:
            problems.add(f"state[{key!r}] belongs to no parameter in param_groups")
        if key in stored:
            problems.add(f"state[{key!r}] is there twice, as number and as text")
        stored[key] = slots
    problems.raise_any()
    parameters = {}
    for key, name in names_by_key.items():
        group = keys[key]
        shaped = names[name] if isinstance(names, Mapping) else None
        parameters[name] = _read_parameter(
            problems, name, key, group, settings[group], stored.get(key, {}), shaped
        )
    problems.raise_any()
    return StateDict(is_timm, settings, list(map(dict, groups)), parameters)


def slots_of(settings: Mapping[str, Any]) -> list[str]:
    """The slots that an optimizer of these settings has."""
    slots = ["square_avg"]
    slots += ["momentum_buffer"] if settings["momentum"] else []
    slots += ["grad_avg"] if settings["centered"] else []
    return slots


def _split(state_dict: Any) -> tuple[dict[Any, Any], list[Any]]:
    """The state and the groups."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict is a {type(state_dict).__name__}. {_HINT}")
    parts = dict(state_dict)
    if flat := [key for key in parts if str(key).startswith("state.")]:
        # The names of a file with one level only, such as one of safetensors.
        parts.setdefault("state", collections.defaultdict(dict))
        for name in flat:
            key, _, slot = name.removeprefix("state.").rpartition(".")
            parts["state"][key][slot] = parts.pop(name)
    if set(parts) != {"state", "param_groups"}:
        raise ValueError(
            "state_dict must have the keys 'state' and 'param_groups', got "
            f"{sorted(map(str, parts))}. {_HINT}"
        )
    state, groups = parts["state"], parts["param_groups"]
    if isinstance(groups, str):
        try:
            groups = json.loads(groups)
        except ValueError as error:
            raise ValueError(f"param_groups is no JSON: {error}. {_HINT}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"state is a {type(state).__name__}, not a mapping. {_HINT}")
    if not isinstance(groups, Sequence) or not groups:
        raise ValueError(f"param_groups must be a list of mappings, got {groups!r}")
    return dict(state), list(groups)


def _read_keys(problems, groups) -> dict[Any, int]:
    """The group of each parameter."""
    keys = {}
    for i, group in enumerate(groups):
        params = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(params, list | tuple) or not all(
            isinstance(key, int | str) for key in params
        ):
            problems.add(
                f"param_groups[{i}] must be a mapping with a list 'params' of numbers"
            )
            continue
        for key in params:
            if key in keys:
                problems.add(
                    f"parameter {key!r} of param_groups[{i}]['params'] is in "
                    f"param_groups[{keys[key]}]['params'] already"
                )
            keys.setdefault(key, i)
    if not keys:
        problems.add("there are no parameters in param_groups")
    return keys


def _read_group(problems, where, group, is_timm) -> dict[str, Any]:
    """The settings of a group, under the names that the dialect has for them."""
    unknown = dict(group)
    for key in _IGNORED:
        unknown.pop(key, None)

    def take(key, default, check, *args, **kwargs):
        if key not in unknown and default is None:
            problems.add(f"{where} has no {key!r}")
            return None
        value = unknown.pop(key, default)
        return problems.attempt(check, f"{where}[{key!r}]", value, *args, **kwargs)

    settings = {
        "lr": take("lr", None, reading.read_number),
        "alpha": take("alpha", None, reading.read_number, high=1),
        "eps": take("eps", None, reading.read_number),
        "weight_decay": take("weight_decay", None, reading.read_number),
        "momentum": take("momentum", 0, reading.read_number, high=1),
        "centered": take("centered", False, checks.check_flag),
    }
    # What has a default here was missing from earlier versions.
    if is_timm:
        for key in ("decoupled_decay", "lr_in_momentum"):
            settings[key] = take(key, None, checks.check_flag)
        for key in ("caution", "corrected_weight_decay"):
            settings[key] = take(key, False, checks.check_flag)
        max_lr = take("max_lr_snapshot", settings["lr"], reading.read_number)
        if settings["corrected_weight_decay"]:
            settings["max_lr_snapshot"] = max_lr
    else:
        settings["maximize"] = take("maximize", False, checks.check_flag)
    if unknown:
        problems.add(
            f"{where} has settings that RMSprop does not have: {sorted(unknown)}. If "
            "no step depends on them, delete them"
        )
    return settings


def _read_names(problems, names, groups, keys) -> dict[Any, Any]:
    """The name of each parameter; its key, if nobody gives a name."""
    saved = None
    if any(group.get("param_names") for group in groups):
        saved = [n for group in groups for n in group.get("param_names") or ()]
    if names is None:
        names = keys if saved is None else saved
    elif isinstance(names, str) or not isinstance(names, (Sequence, Mapping)):
        problems.add(f"names must be a list or a mapping, got {names!r}")
        return {}
    for name in names if isinstance(names, Mapping) else ():
        if not (hasattr(names[name], "shape") and hasattr(names[name], "dtype")):
            problems.add(f"names[{name!r}] must be an array, got {names[name]!r}")
    given = list(names)
    for name, count in collections.Counter(given).items():
        if count > 1:
            problems.add(f"the name {name!r} is given to {count} parameters")
    if len(given) != len(keys):
        problems.add(
            f"there are {len(keys)} parameters in param_groups, but {len(given)} names"
        )
    if saved is not None and isinstance(names, Mapping) and set(saved) == set(given):
        given = saved
    if saved is not None and saved != given:
        problems.add(
            f"the param_names in the state dict are {saved}, but names are {given}; "
            "leave names out, and rename in the conversion"
        )
    return dict(zip(keys, given, strict=False))


def _read_parameter(problems, name, key, group, settings, stored, shaped) -> Parameter:
    """The state of a parameter; ``shaped`` is an array like it, or ``None``."""
    what = f"state[{key!r}]" if name == key else f"state[{key!r}] ({name})"
    if not isinstance(stored, Mapping):
        problems.add(f"{what} must be a mapping, got {stored!r}")
        stored = {}
    if not stored:
        return Parameter(key, group, 0, {}, stored, shaped)
    expected = slots_of(settings)
    if missing := {"step", *expected} - stored.keys():
        problems.add(f"{what} has no {', '.join(sorted(missing))}")
    if left_over := stored.keys() - {"step", *expected}:
        problems.add(
            f"{what} has {', '.join(sorted(map(str, left_over)))}, for which there is "
            f"no use in param_groups[{group}] with momentum={settings['momentum']!r} "
            f"and centered={settings['centered']!r}; if that is right, delete it"
        )
    step = 0
    if "step" in stored:
        step = problems.attempt(reading.read_count, f"{what}['step']", stored["step"])
    slots = {}
    for slot in expected:
        if slot not in stored:
            continue
        like = shaped if shaped is not None else slots.get("square_avg")
        slots[slot] = problems.attempt(
            reading.read_array,
            f"{what}[{slot!r}]",
            stored[slot],
            like,
            nonnegative=slot == "square_avg",
        )
    template = stored.get("square_avg", shaped)
    return Parameter(key, group, step or 0, slots, stored, template)
