# SPDX-License-Identifier: Apache-2.0
"""RMSProp as PyTorch and timm have it, and runs handed over from and to them."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rms._leaf_names import dotted_name
from optax_rms._scale_by_rms import ScaleByStddevState
from optax_rms._schedules import check_learning_rate
from optax_rms._types import LearningRate, PyTree
from optax_rms.dialects._shared import chain_state, reading, variances
from optax_rms.dialects._shared.converter import Converter
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects.torch import _optimizers as optimizers
from optax_rms.dialects.torch import _saved as state_dicts
from optax_rms.dialects.torch._optimizers import rmsprop as rmsprop
from optax_rms.dialects.torch._optimizers import rmsprop_tf as rmsprop_tf

Arrays = dict[str, np.ndarray]

_SLOTS = ("square_avg", "momentum_buffer", "grad_avg")


def import_state(
    state_dict: Mapping[str, Any],
    convert: Callable[[Any], PyTree],
    names: state_dicts.Names | None = None,
    learning_rate: LearningRate | Sequence[LearningRate | None] | None = None,
) -> tuple[optax.GradientTransformation, Any]:
    """Take over a run from ``torch.optim.RMSprop`` or timm's ``RMSpropTF``.

    Args:
      state_dict: what the optimizer's ``state_dict()`` returned, as it is, read from a
        file of ``torch.save``, or with other arrays, such as NumPy's, in place of
        tensors. It may also be flat, with keys like ``"state.0.square_avg"`` and the
        ``param_groups`` as JSON, as they fit into a safetensors file and its metadata.
        It is timm's if its groups have ``lr_in_momentum``. Beware of optimizers that
        save the same keys and mean another formula: stable-baselines3's RMSpropTFLike
        and pfrl's RMSpropEpsInsideSqrt put epsilon inside the root.
      convert: the function that turns the parameters, as ``{name: array}``, into the
        tree of parameters here. It is called with the slots of the optimizer in place
        of the parameters, in arrays of the kind that the state dict holds, those of
        half precision widened to float32. It may rename, transpose, reshape, split and
        join arrays, but not scale, pad, drop or round them.
      names: names of the parameters, in the order in which the optimizer was given
        them; or a mapping from the names to the parameters, such as
        ``dict(model.named_parameters())``, with which all shapes are checked, and which
        is needed if a parameter had no step yet. ``None`` for the ``param_names`` in
        the state dict or, if there are none, for the integers that it has as keys.
      learning_rate: a number, array, or schedule in place of the ``lr`` in the state
        dict, or a list with one for each group, ``None`` for ``lr``. A schedule is not
        started anew: it continues at the number of steps that the optimizer has taken.
        A momentum that PyTorch's ``OneCycleLR`` or ``CyclicLR`` varies stays as it is
        in the state dict.

    Returns:
      The transformation, and its state, which continue the run: with ``param_groups``
      of different settings an ``optax.partition``, otherwise `rmsprop` or `rmsprop_tf`.
      A parameter without state starts afresh, as it does in PyTorch.

    Raises:
      ValueError: naming everything in the state dict that is missing, left over, of a
        wrong shape or dtype, out of range or not finite, or all arrays with which
        ``convert`` does something else than allowed.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from optax_rms import dialects
      >>> state_dict = {
      ...     "state": {0: {"step": 25, "square_avg": np.full((2, 3), 4, "f4")}},
      ...     "param_groups": [
      ...         {"params": [0], "lr": 0.1, "alpha": 0.9, "eps": 0, "weight_decay": 0}
      ...     ],
      ... }
      >>> def convert(arrays):
      ...     return {"kernel": jnp.asarray(arrays["weight"]).T}
      >>> tx, state = dialects.torch.import_state(state_dict, convert, ["weight"])

      The mean square is 4, so a gradient of 2 moves a parameter by the learning rate:

      >>> updates, state = tx.update({"kernel": jnp.full((3, 2), 2.0)}, state)
      >>> print(updates["kernel"][0])
      [-0.1 -0.1]

      And back, one step further:

      >>> def convert_back(params):
      ...     return {"weight": params["kernel"].T}
      >>> state_dict = dialects.torch.export_state(
      ...     state, convert_back, ["weight"], like=state_dict
      ... )
      >>> print(state_dict["state"][0]["step"])
      26
    """
    saved = state_dicts.read(state_dict, names)
    problems = Problems("the state dict cannot be imported")
    settings = _with_rates(problems, saved.groups, learning_rate)
    for name, parameter in saved.parameters.items():
        if parameter.template is None:
            problems.add(
                f"{name!r} had no step yet, so that its shape is unknown; let names be "
                "a mapping from names to parameters"
            )
        elif saved.is_timm and np.iscomplexobj(reading.to_numpy(parameter.template)):
            problems.add(
                f"{name!r} is complex; timm squares complex gradients without taking "
                "their modulus, so that its square_avg is of no use"
            )
    problems.raise_any()

    parameters = saved.parameters.values()
    converter = Converter(
        "convert", convert, _named(saved, [p.template for p in parameters])
    )
    columns = [_from_torch(p, settings[p.group], saved.is_timm) for p in parameters]
    trees = {}
    for slot in _SLOTS:
        if any(slot in column for column in columns):
            arrays = [c.get(slot, np.zeros_like(c["square_avg"])) for c in columns]
            moved = converter(slot, _named(saved, arrays))
            trees[slot] = jax.tree.map(jnp.asarray, moved)
    like_params = trees["square_avg"]
    steps = max(p.step for p in parameters)
    make = rmsprop_tf if saved.is_timm else rmsprop

    # Of the groups with the same settings, the first stands for all.
    groups = [settings.index(settings[p.group]) for p in parameters]
    if len(set(groups)) == 1:
        tx = make(**settings[groups[0]])
        return tx, _fill(tx.init(like_params), trees, steps)
    labels = _labels(converter, groups, like_params)
    tx = optax.partition({i: make(**settings[i]) for i in sorted({*groups})}, labels)
    state: Any = tx.init(like_params)
    inner_states = {}
    for i, masked in state.inner_states.items():
        own = {slot: _mask(tree, labels, i) for slot, tree in trees.items()}
        inner_state = _fill(masked.inner_state, own, steps)
        inner_states[i] = masked._replace(inner_state=inner_state)
    return tx, state._replace(inner_states=inner_states)


def export_state(
    state: Any,
    convert_back: Callable[[PyTree], Any],
    names: state_dicts.Names | None = None,
    *,
    like: Mapping[str, Any],
) -> dict[str, Any]:
    """Hand a run over to ``torch.optim.RMSprop`` or timm's ``RMSpropTF``.

    What it returns is for the optimizer's ``load_state_dict``. The settings, learning
    rates included, are those of ``like``.

    Args:
      state: of `rmsprop` or `rmsprop_tf`, or of an ``optax.partition`` of them, such
        as `import_state` returns. The state of ``optax_rms.rmsprop`` with a schedule is
        the same.
      convert_back: the inverse of the ``convert`` of `import_state`: it turns a tree of
        parameters into ``{name: array}``.
      names: as for `import_state`. Let it be a mapping if ``like`` has no state.
      like: a state dict of the optimizer that is to take over: the one that was
        imported, or that of a new optimizer. Tensors, dtypes and devices are as in
        there. Parameters that lag behind the others by some steps, still do.

    Returns:
      A state dict.

    Raises:
      ValueError: naming everything in which the state does not fit ``like``, or all
        arrays with which ``convert_back`` does something else than allowed. A momentum
        with the learning rate inside is refused where the optimizer has it outside, as
        a division by rates of the past would be needed, and the other way round.
    """
    saved = state_dicts.read(like, names)
    parts = _parts(state)
    trees = {}
    for slot in _SLOTS:
        if any(slot in part.slots for part in parts):
            trees[slot] = _merge([part.slots.get(slot, part.zeros) for part in parts])
    converter = Converter("convert_back", convert_back, trees["square_avg"])
    columns = {slot: converter(slot, tree) for slot, tree in trees.items()}

    if not isinstance(columns["square_avg"], Mapping):
        raise ValueError("convert_back must return a mapping from names to arrays")
    problems = Problems("the state cannot be exported")
    for name in saved.parameters.keys() - columns["square_avg"].keys():
        problems.add(f"convert_back returned no {name!r}, which is in like")
    for name in columns["square_avg"].keys() - saved.parameters.keys():
        problems.add(f"convert_back returned {name!r}, which is not in like")
    problems.raise_any()

    indices = [
        jax.tree.map(lambda _, i=i: i, part.zeros) for i, part in enumerate(parts)
    ]
    owners = [parts[i] for i in jax.tree.leaves(_merge(indices))]
    sources = jax.tree.unflatten(converter.treedef, converter.sources)
    steps_taken = parts[0].steps - max(p.step for p in saved.parameters.values())
    stored = {}
    for name, parameter in saved.parameters.items():
        slots = {slot: column[name] for slot, column in columns.items()}
        origins = [owners[i] for i in sources[name]]
        entry = problems.attempt(_to_torch, name, saved, slots, origins, steps_taken)
        if entry:
            stored[parameter.key] = entry
    problems.raise_any()
    return {"state": stored, "param_groups": saved.param_groups}


class _Part(NamedTuple):
    """The state of a chain in PyTorch's words: the whole state, or that of a group.

    Attributes:
      slots: the trees that there are: ``square_avg``, or the variance in its place;
        ``momentum_buffer``, but of either sign; ``grad_avg``.
      steps: the number of steps.
      lr_in_momentum: whether the momentum contains the learning rate.
    """

    slots: dict[str, PyTree]
    steps: int
    lr_in_momentum: bool

    @property
    def zeros(self) -> PyTree:
        return jax.tree.map(jnp.zeros_like, self.slots["square_avg"])


def _parts(state: Any) -> list[_Part]:
    if not isinstance(state, optax.PartitionState):
        return [_part(state)]
    masked_states: Any = state.inner_states.values()
    return [_part(masked.inner_state) for masked in masked_states]


def _part(state: Any) -> _Part:
    kinds = (
        [type(step) for step in state] if isinstance(state, tuple) else [type(state)]
    )
    if (
        len(kinds) != 3
        or kinds[0] not in (optax.ScaleByRmsState, ScaleByStddevState)
        or optax.ScaleByScheduleState not in kinds
        or "count" in chain_state.fields(state[:1])
    ):
        raise ValueError(
            "state must be that of rmsprop or rmsprop_tf, or of optax_rms.rmsprop with "
            "a schedule as learning rate and without bias_correction, got "
            f"{', '.join(kind.__name__ for kind in kinds)}"
        )
    values = chain_state.fields(state)
    trees = {
        "square_avg": values.get("nu", values.get("variance")),
        "momentum_buffer": values.get("trace"),
        "grad_avg": values.get("mu"),
    }
    slots = {k: optimizers.join(tree) for k, tree in trees.items() if tree is not None}
    return _Part(slots, int(values["count"]), kinds[1] is optax.ScaleByScheduleState)


def _merge(trees: Sequence[PyTree]) -> PyTree:
    """The tree of whose leaves each of ``trees`` has some, and masks for the others."""

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    def pick(*leaves):
        return next(leaf for leaf in leaves if not is_masked(leaf))

    return jax.tree.map(pick, *trees, is_leaf=is_masked)


def _from_torch(
    parameter: state_dicts.Parameter, settings: dict[str, Any], is_timm: bool
) -> Arrays:
    """The slots as they are here, also of a parameter that PyTorch has none for yet."""
    blank = np.zeros_like(reading.to_numpy(parameter.template))
    slots = {
        slot: parameter.slots.get(slot, blank)
        for slot in state_dicts.slots_of(settings)
    }
    if not parameter.slots:
        slots["square_avg"] = blank + is_timm
    if settings["centered"]:
        slots["square_avg"] = variances.variance(slots["square_avg"], slots["grad_avg"])
    if settings["momentum"] and settings.get("lr_in_momentum"):
        slots["momentum_buffer"] = -slots["momentum_buffer"]
    return slots


def _to_torch(
    name: Any,
    saved: state_dicts.StateDict,
    slots: Arrays,
    origins: Sequence[_Part],
    steps_taken: int,
) -> dict[str, Any]:
    """What the framework stores for a parameter: nothing, if it had no step.

    ``slots`` are as they are here, ``origins`` the parts of the state that they come
    from, and ``steps_taken`` those since ``like``.
    """
    parameter = saved.parameters[name]
    settings = saved.groups[parameter.group]
    _check_origins(name, parameter, settings, slots, origins)
    slots = {slot: slots[slot] for slot in state_dicts.slots_of(settings)}
    square, *others = slots.values()
    is_blank = np.all(square == saved.is_timm) and not any(map(np.any, others))
    if is_blank and not parameter.slots:
        return {}
    _check_template(name, parameter, square)
    if (step := parameter.step + steps_taken) < 0:
        raise ValueError(f"{name!r} in like has had more steps than the state")

    template = parameter.template
    dtype = _dtype(template)
    with np.errstate(over="ignore"):
        stored = {slot: array.astype(dtype) for slot, array in slots.items()}
    if settings["centered"]:
        stored["square_avg"] = variances.mean_square(square, stored["grad_avg"])
    if settings["momentum"] and settings.get("lr_in_momentum"):
        stored["momentum_buffer"] = -stored["momentum_buffer"]
    for slot, array in stored.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{slot} of {name!r} is not finite in {dtype}")
    return {
        "step": _step_like(step, parameter),
        **{k: reading.to_framework(array, template) for k, array in stored.items()},
    }


def _check_origins(name, parameter, settings, slots, origins) -> None:
    """Raise a ``ValueError`` if the parts of the state lack what the group needs."""
    needed = state_dicts.slots_of(settings)
    if any(origin.slots.keys() != set(needed) for origin in origins):
        raise ValueError(
            f"{name!r} is in param_groups[{parameter.group}] of like, with momentum "
            f"{settings['momentum']} and centered {settings['centered']}, which needs "
            f"{needed}, but the state has {[list(origin.slots) for origin in origins]}"
        )
    inside = settings.get("lr_in_momentum", False)
    if np.any(slots.get("momentum_buffer", 0)) and any(
        origin.lr_in_momentum != inside for origin in origins
    ):
        has, wants = ("lacks", "with") if inside else ("has", "without")
        raise ValueError(
            f"the momentum of {name!r} {has} the learning rate as a factor, and the "
            f"optimizer of like needs it {wants}. It sums up steps of different "
            "learning rates, so no factor converts it. Train here with the dialect of "
            "like, or set the trace to 0"
        )


def _check_template(name, parameter, array) -> None:
    """Raise a ``ValueError`` if the parameter is unknown, or another than the array."""
    if parameter.template is None:
        raise ValueError(
            f"{name!r} has no state in like from which to take shape and dtype; let "
            "names be a mapping from names to parameters"
        )
    like = reading.to_numpy(parameter.template)
    if array.shape != like.shape or np.iscomplexobj(array) != np.iscomplexobj(like):
        raise ValueError(
            f"{name!r} must be {reading.describe(like)} as in like, but convert_back "
            f"returned {reading.describe(array)}"
        )


def _step_like(step: int, parameter: state_dicts.Parameter) -> Any:
    """A step count in the form that ``like`` has for it, or, without one, PyTorch's."""
    if "step" not in parameter.stored:
        scalar = reading.widen(parameter.template.real)
        return reading.to_framework(np.array(step, np.float32), scalar)
    stored = parameter.stored["step"]
    if not hasattr(stored, "dtype"):
        return step
    steps = np.full(np.shape(stored), step, _dtype(stored))
    return reading.to_framework(steps, stored)


def _dtype(array: Any) -> np.dtype:
    return jnp.dtype(str(array.dtype).removeprefix("torch."))


def _named(saved: state_dicts.StateDict, arrays: Sequence[Any]) -> Any:
    # Not a dict, whose order is lost when it is flattened: convert may rely on it.
    return collections.OrderedDict(zip(saved.parameters, arrays, strict=True))


def _fill(state: Any, trees: dict[str, PyTree], steps: int) -> Any:
    """The state of a chain with PyTorch's slots in place of those from ``init``."""
    split = {slot: optimizers.split(tree) for slot, tree in trees.items()}
    ours = {"nu": "square_avg", "variance": "square_avg"}
    ours |= {"mu": "grad_avg", "trace": "momentum_buffer"}
    new = {field: split[slot] for field, slot in ours.items() if slot in split}
    # Each group's own: one array in two places could not be donated.
    return chain_state.with_fields(state, new | {"count": jnp.array(steps, jnp.int32)})


def _labels(converter: Converter, groups: Sequence[int], tree: PyTree) -> PyTree:
    """The group of each leaf, from the groups of the parameters."""
    problems = Problems("param_groups have different settings")
    labels = []
    for (path, _), sources in zip(
        jax.tree.leaves_with_path(tree), converter.sources, strict=True
    ):
        own = sorted({groups[i] for i in sources}) or groups[:1]
        labels.append(own[0])
        if len(own) > 1:
            problems.add(
                f"convert joins parameters of the groups {own} in "
                f"{dotted_name(path)}; keep them in leaves of their own"
            )
    problems.raise_any()
    return jax.tree.unflatten(converter.treedef, labels)


def _mask(tree: PyTree, labels: PyTree, label: int) -> PyTree:
    def mask(leaf, own):
        return leaf if own == label else optax.MaskedNode()

    return jax.tree.map(mask, tree, labels)


def _with_rates(problems, groups, learning_rate) -> list[dict[str, Any]]:
    """The settings of the groups, with the learning rates that the user wants."""
    rates = learning_rate
    if not isinstance(rates, (list, tuple)):
        rates = [learning_rate] * len(groups)
    if len(rates) != len(groups):
        problems.add(
            f"learning_rate must be one, or a list of {len(groups)} for as many "
            f"param_groups, got a list of {len(rates)}"
        )
    settings = []
    for group, rate in zip(groups, rates, strict=False):
        if rate is not None:
            problems.attempt(check_learning_rate, "learning_rate", rate)
        settings.append(group if rate is None else group | {"lr": rate})
    return settings
