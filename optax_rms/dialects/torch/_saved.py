# SPDX-License-Identifier: Apache-2.0
"""State dicts of PyTorch's RMSprop and its relatives, read and checked."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_rms import _checks as checks
from optax_rms.dialects._shared import reading
from optax_rms.dialects._shared.problems import Problems

Names = Sequence[str] | Mapping[str, Any]
Groups = Sequence[Mapping[str, Any]]

# The classes whose state dicts are read, and the number that square_avg starts from.
SQUARE_AVG_STARTS = {
    "RMSprop": 0.0,
    "RMSpropTF": 1.0,
    "RMSpropTFLike": 1.0,
    "RMSpropEpsInsideSqrt": 0.0,
}
SLOTS = ("square_avg", "momentum_buffer", "grad_avg")

_HINT = "It must be what the state_dict() of an RMSprop optimizer returned."
PREFIX_HINT = (
    'torch.compile puts "_orig_mod." and DataParallel "module." before the names: to '
    'remove that, pass for example strip_prefix="_orig_mod."'
)

# Keys of a group on which no step depends. The second line is left by the schedulers of
# PyTorch and timm, the last by timm's functions that form groups.
_IGNORED = {
    *("params", "param_names", "capturable", "foreach", "differentiable", "name"),
    *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
    *("lr_scale", "use_fallback"),
}


class Parameter(NamedTuple):
    """The part of a state dict that is about one parameter.

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
    """A state dict in which no fault was found.

    Attributes:
      optimizer: the name of the optimizer's class, a key of `SQUARE_AVG_STARTS`.
      groups: for each group, the arguments of the dialect's function; none for a group
        without parameters.
      param_groups: the groups as they are in the state dict.
      parameters: by name, in the order in which the optimizer has them.
    """

    optimizer: str
    groups: list[dict[str, Any]]
    param_groups: list[dict[str, Any]]
    parameters: dict[Any, Parameter]

    @property
    def steps(self) -> int:
        return max(parameter.step for parameter in self.parameters.values())


def read(
    state_dict: Mapping[str, Any],
    names: Names | None,
    optimizer: str | None,
    strip_prefix: str | Sequence[str],
) -> StateDict:
    """Read a state dict. All faults that are found go into one ``ValueError``."""
    state, groups = _split(state_dict)
    problems = Problems("the state dict cannot be used")
    keys = _read_keys(problems, groups)
    problems.raise_any()
    optimizer = _read_optimizer(optimizer, groups)
    settings = [
        _read_group(problems, f"param_groups[{i}]", group, optimizer)
        for i, group in enumerate(groups)
    ]
    names_by_key, templates = _read_names(
        problems, names, groups, list(keys), strip_prefix
    )
    stored = _read_state(problems, state, keys)
    problems.raise_any()
    parameters = {}
    for key, name in names_by_key.items():
        group = keys[key]
        parameters[name] = _read_parameter(
            problems,
            name,
            key,
            group,
            settings[group],
            stored.get(key, {}),
            templates.get(name),
        )
    problems.raise_any()
    return StateDict(optimizer, settings, list(map(dict, groups)), parameters)


def slots_of(settings: Mapping[str, Any]) -> list[str]:
    """The slots that an optimizer of these settings has."""
    slots = ["square_avg"]
    slots += ["momentum_buffer"] if settings["momentum"] else []
    slots += ["grad_avg"] if settings["centered"] else []
    return slots


def _split(state_dict: Any) -> tuple[dict[Any, Any], Groups]:
    """Return the state and the groups, of a nested or of a flat mapping."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict is a {type(state_dict).__name__}. {_HINT}")
    parts = dict(state_dict)
    # Keys such as "state.0.square_avg", in a file of safetensors, or such as
    # "state.dense.weight.square_avg" and "param_groups.dense.weight.lr", as
    # torch.distributed.checkpoint flattens them.
    for part in ("state", "param_groups"):
        if flat := [key for key in parts if str(key).startswith(f"{part}.")]:
            nested = collections.defaultdict(dict)
            for path in flat:
                key, _, entry = path.removeprefix(f"{part}.").rpartition(".")
                nested[key][entry] = parts.pop(path)
            parts.setdefault(part, dict(nested))
            parts.setdefault("state", {})
    if set(parts) != {"state", "param_groups"}:
        raise ValueError(
            "state_dict must have the keys 'state' and 'param_groups', got "
            f"{sorted(map(str, parts))}. {_HINT}{_where_else(parts)}"
        )
    state, groups = parts["state"], parts["param_groups"]
    if isinstance(groups, str):
        try:
            groups = json.loads(groups)
        except ValueError as error:
            raise ValueError(f"param_groups is no JSON: {error}. {_HINT}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"state is a {type(state).__name__}, not a mapping. {_HINT}")
    if isinstance(groups, dict) and "param_groups" not in state_dict:
        groups = _group(groups)
    if not isinstance(groups, Sequence) or not groups:
        raise ValueError(f"param_groups must be a list of mappings, got {groups!r}")
    return dict(state), groups


def _where_else(parts: Mapping[Any, Any]) -> str:
    """The entries of a checkpoint that may hold the state of the optimizer."""
    found = [
        f"[{key!r}]{'[0]' if isinstance(value, list) else ''}"
        for key, value in parts.items()
        if "optim" in str(key)
    ]
    return f" Is it in {' or '.join(found)}?" if found else ""


def _group(settings: Mapping[str, Mapping[str, Any]]) -> Groups:
    """Form groups of the parameters that have equal settings."""
    groups: dict[str, dict[str, Any]] = {}
    for name, own in settings.items():
        # The keys are the names; param_names would be those of all parameters.
        own = {key: value for key, value in own.items() if key != "param_names"}
        group = groups.setdefault(repr(sorted(own.items())), {"params": [], **own})
        group["params"].append(name)
    return list(groups.values())


def _read_keys(problems: Problems, groups: Groups) -> dict[Any, int]:
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


def _read_optimizer(optimizer: str | None, groups: Groups) -> str:
    """The class of the optimizer. Only the groups of timm's are different."""
    is_timm = any("lr_in_momentum" in group for group in groups)
    if optimizer is None:
        return "RMSpropTF" if is_timm else "RMSprop"
    if optimizer not in SQUARE_AVG_STARTS:
        raise ValueError(
            f"optimizer must be one of {', '.join(SQUARE_AVG_STARTS)}, or None for the "
            f"first two, which the state dict tells apart, got {optimizer!r}"
        )
    if is_timm != (optimizer == "RMSpropTF"):
        has = "have" if is_timm else "lack"
        raise ValueError(
            f"optimizer is {optimizer!r}, but param_groups {has} 'lr_in_momentum', a "
            "setting of timm's RMSpropTF"
        )
    return optimizer


def _read_group(
    problems: Problems, where: str, group: Mapping[str, Any], optimizer: str
) -> dict[str, Any]:
    """The settings of a group, under the names that the dialect has for them."""
    if not group["params"]:
        # PyTorch's set_optimizer_state_dict leaves them without settings.
        return {}
    unknown = {key: value for key, value in group.items() if key not in _IGNORED}

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
    # Settings with a default here are missing from state dicts of earlier versions.
    if optimizer == "RMSpropTF":
        for key in ("decoupled_decay", "lr_in_momentum"):
            settings[key] = take(key, None, checks.check_flag)
        for key in ("caution", "corrected_weight_decay"):
            settings[key] = take(key, False, checks.check_flag)
        max_lr = take("max_lr_snapshot", settings["lr"], reading.read_number)
        if settings["corrected_weight_decay"]:
            settings["max_lr_snapshot"] = max_lr
    elif optimizer == "RMSprop":
        settings["maximize"] = take("maximize", False, checks.check_flag)
    elif optimizer == "RMSpropEpsInsideSqrt":
        # Inherited from PyTorch's class, and without effect.
        unknown.pop("maximize", None)
    if unknown:
        problems.add(
            f"{where} has settings that RMSprop does not have: {sorted(unknown)}. If "
            "no step depends on them, delete them"
        )
    return settings


def _read_names(
    problems: Problems,
    names: Names | None,
    groups: Groups,
    keys: list[Any],
    strip_prefix: str | Sequence[str],
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The name of each key, which is the key if no name is given, and the templates.

    The templates are the arrays of ``names``, if that is a mapping, by name.
    """
    if names is not None and (
        isinstance(names, str) or not isinstance(names, Sequence | Mapping)
    ):
        problems.add(f"names must be a list or a mapping, got {names!r}")
        return {}, {}
    templates = _read_templates(problems, names) if isinstance(names, Mapping) else {}
    given = None if names is None else list(names)
    saved = _saved_names(groups, keys)
    if strip_prefix:
        prefixes = [strip_prefix] if isinstance(strip_prefix, str) else strip_prefix
        _check_prefixes(problems, saved or given or keys, prefixes)
        saved = saved and _stripped(saved, prefixes)
        given = given and _stripped(given, prefixes)
        templates = {_stripped([k], prefixes)[0]: v for k, v in templates.items()}
    if saved is not None and isinstance(names, Mapping) and {*saved} == {*templates}:
        # The order of a mapping need not be that of the optimizer.
        given = saved
    if given is None:
        given = keys if saved is None else saved
    for name, count in collections.Counter(given).items():
        if count > 1:
            problems.add(f"the name {name!r} is given to {count} parameters")
    if len(given) != len(keys):
        problems.add(
            f"there are {len(keys)} parameters in param_groups, but {len(given)} names"
        )
    if saved is not None and saved != given:
        problems.add(
            f"the param_names in the state dict are {saved}, but names are {given}; "
            f"leave names out, and rename in the conversion. {PREFIX_HINT}"
        )
    return dict(zip(keys, given, strict=False)), templates


def _read_templates(problems: Problems, names: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in names.items():
        if not (hasattr(value, "shape") and hasattr(value, "dtype")):
            problems.add(f"names[{name!r}] must be an array, got {value!r}")
    return dict(names)


def _saved_names(groups: Groups, keys: list[Any]) -> list[str] | None:
    """The names in the state dict: param_names, or keys that are no numbers."""
    if any(group.get("param_names") for group in groups):
        return [name for group in groups for name in group.get("param_names") or ()]
    is_named = all(isinstance(key, str) and not key.isdecimal() for key in keys)
    return list(keys) if is_named else None


def _stripped(names: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    """The names without the prefixes, which are removed one after the other."""
    stripped = list(map(str, names))
    for prefix in prefixes:
        stripped = [name.removeprefix(prefix) for name in stripped]
    return stripped


def _check_prefixes(
    problems: Problems, names: Sequence[Any], prefixes: Sequence[str]
) -> None:
    for i, prefix in enumerate(prefixes):
        rest = _stripped(names, prefixes[:i])
        if not any(name.startswith(prefix) for name in rest):
            problems.add(
                f"strip_prefix has {prefix!r}, with which none of the names {rest} "
                "begins"
            )


def _read_state(
    problems: Problems, state: Mapping[Any, Any], keys: Mapping[Any, int]
) -> dict[Any, Any]:
    """The state by the keys in param_groups, which JSON and safetensors may alter."""
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
    return stored


def _read_parameter(
    problems: Problems,
    name: Any,
    key: Any,
    group: int,
    settings: Mapping[str, Any],
    stored: Any,
    shaped: Any,
) -> Parameter:
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
    left_over = stored.keys() - {"step", *expected}
    # Code that shares the state between processes allocates all slots.
    left_over -= {slot for slot in left_over & {*SLOTS} if _is_zero(stored[slot])}
    if left_over:
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


def _is_zero(array: Any) -> bool:
    return hasattr(array, "shape") and not np.any(reading.to_numpy(array))
