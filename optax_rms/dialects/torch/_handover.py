# SPDX-License-Identifier: Apache-2.0
"""Import of runs of PyTorch's RMSprop and its relatives, and export to them."""

import collections
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rms import _checks as checks
from optax_rms._leaf_names import dotted_name
from optax_rms._scale_by_rms import ScaleByStddevState
from optax_rms._schedules import as_schedule, check_learning_rate
from optax_rms._types import LearningRate, PyTree
from optax_rms.dialects._shared import chain_state, reading, slots
from optax_rms.dialects._shared.converter import Converter
from optax_rms.dialects._shared.plain_state import check_plain_state
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects.torch import _optimizers as optimizers
from optax_rms.dialects.torch import _saved as state_dicts
from optax_rms.dialects.torch import _schedules as schedules

Arrays = dict[str, np.ndarray]
LearningRates = LearningRate | Sequence[LearningRate | None]

_FIELDS = {"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"}
_SLOTS = {"variance": "square_avg", **{field: slot for slot, field in _FIELDS.items()}}
_FUNCTIONS = {
    "RMSprop": optimizers.rmsprop,
    "RMSpropTF": optimizers.rmsprop_tf,
    "RMSpropTFLike": optimizers.rmsprop_tf_like,
    "RMSpropEpsInsideSqrt": optimizers.rmsprop_eps_inside_sqrt,
}
_NAMES_HINT = (
    "Other names can be given with names=dict(model.named_parameters()), and prefixes "
    f"removed. {state_dicts.PREFIX_HINT}"
)


def import_state(
    state_dict: Mapping[str, Any],
    convert: Callable[[Any], PyTree],
    names: state_dicts.Names | None = None,
    learning_rate: LearningRates | None = None,
    *,
    lr_scheduler: Mapping[str, Any] | None = None,
    steps_per_scheduler_step: int | None = None,
    strip_prefix: str | Sequence[str] = (),
    optimizer: str | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, Any]:
    """Continue a run of ``torch.optim.RMSprop`` or of a class with the same state.

    The other classes are timm's ``RMSpropTF``, stable-baselines3's ``RMSpropTFLike``
    and pfrl's ``RMSpropEpsInsideSqrt``.

    Args:
      state_dict: the result of the optimizer's ``state_dict()``, as it is or read from
        a file of ``torch.save``; tensors may be arrays of another framework, for
        example of NumPy. Flat mappings are accepted as well: with keys like
        ``"state.0.square_avg"`` and ``param_groups`` as JSON, as they fit into a file
        of safetensors, or as ``torch.distributed.checkpoint`` flattens a state, with
        keys like ``"state.dense.weight.step"`` and ``"param_groups.dense.weight.lr"``.
      convert: the function that turns the parameters, as ``{name: array}``, into the
        tree of parameters here. The function is called once per slot of the optimizer,
        with the slot in place of the parameters, in arrays of the framework of the
        state dict; half precision is widened to float32. ``convert`` may rename,
        transpose, reshape, split and join arrays, but not scale, pad, drop or round
        them.
      names: the names of the parameters, in the order in which the optimizer was given
        the parameters; or a mapping from the names to the parameters, for example
        ``dict(model.named_parameters())``, with which all shapes are checked, and which
        is needed if a parameter had no step yet. ``None`` for the names in the state
        dict, ``param_names`` or the keys, or for the numbers there.
      learning_rate: a number, array, or schedule in place of the ``lr`` in the state
        dict, or a list with one for each group, ``None`` for ``lr``. A schedule is a
        function of the number of optimizer steps and continues at the number of steps
        that the optimizer has taken.
      lr_scheduler: the result of ``scheduler.state_dict()``, for a scheduler of
        PyTorch: StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR,
        CosineAnnealingLR, CosineAnnealingWarmRestarts, OneCycleLR without
        ``cycle_momentum``, SequentialLR or ChainedScheduler. The rate continues as with
        the scheduler, also after its end. After the last period of a ChainedScheduler
        that has no closed form, for example LinearLR with CosineAnnealingLR, a step
        takes time in proportion to the steps since then.
      steps_per_scheduler_step: the number of optimizer steps after which
        ``scheduler.step()`` is called: 1 for every step, or the number of batches of an
        epoch. Needed unless the scheduler has been called after every step.
      strip_prefix: a prefix to remove from the names, for example ``"_orig_mod."`` or
        ``"module."``, or a list of prefixes, the first of the name first.
      optimizer: the name of the class, ``"RMSpropTFLike"`` for stable-baselines3 or
        ``"RMSpropEpsInsideSqrt"`` for pfrl, whose state dicts look like those of
        PyTorch, with another formula. ``None`` for PyTorch and timm.

    Returns:
      The transformation and its state, which continue the run. With ``param_groups`` of
      different settings the transformation is an ``optax.partition``, otherwise
      `rmsprop`, `rmsprop_tf`, `rmsprop_tf_like` or `rmsprop_eps_inside_sqrt`. A
      parameter without state starts anew, as it does in PyTorch.

    Raises:
      ValueError: naming everything in the state dict that is missing, left over, of a
        wrong shape or dtype, out of range or not finite, or all arrays with which
        ``convert`` does something else than allowed; or the reason why a scheduler is
        not continued.

    Warns:
      UserWarning: a scheduler has been used, as ``initial_lr`` in ``param_groups``
        shows, and neither ``lr_scheduler`` nor ``learning_rate`` is given.

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

      A scheduler that halves the rate after every 26 steps continues, too:

      >>> scheduler = {
      ...     **dict(step_size=26, gamma=0.5, base_lrs=[0.1], last_epoch=26)
      ... }
      >>> state_dict["param_groups"][0]["lr"] = 0.05
      >>> tx, state = dialects.torch.import_state(
      ...     state_dict, convert, ["weight"], lr_scheduler=scheduler
      ... )
      >>> updates, state = tx.update({"kernel": jnp.full((3, 2), 2.0)}, state)
      >>> print(updates["kernel"][0])
      [-0.05 -0.05]
    """
    saved = state_dicts.read(state_dict, names, optimizer, strip_prefix)
    problems = Problems("the state dict cannot be imported")
    settings = _settings(
        problems, saved, learning_rate, lr_scheduler, steps_per_scheduler_step
    )
    _check_templates(problems, saved)
    problems.raise_any()
    if learning_rate is None and lr_scheduler is None:
        _warn_of_scheduler(
            saved,
            "Its present rate would stay constant. Pass "
            "lr_scheduler=scheduler.state_dict(), or a schedule or number as "
            "learning_rate",
        )

    parameters = saved.parameters.values()
    converter = Converter(
        "convert",
        convert,
        _named(saved, [p.template for p in parameters]),
        name_hint=_NAMES_HINT,
    )
    columns = [_from_torch(p, settings[p.group], saved) for p in parameters]
    trees = {}
    for field in {field: None for column in columns for field in column}:
        arrays = [_field(column, field) for column in columns]
        moved = converter(_SLOTS[field], _named(saved, arrays))
        trees[field] = jax.tree.map(jnp.asarray, moved)
    make = _FUNCTIONS[saved.optimizer]
    like_params: Any = trees.get("nu", trees.get("variance"))

    # Of the groups with the same settings, the first stands for all.
    groups = [settings.index(settings[p.group]) for p in parameters]
    if len(set(groups)) == 1:
        tx = make(**settings[groups[0]])
        return tx, _fill(tx.init(like_params), trees, saved.steps)
    labels = _labels(converter, groups, like_params)
    tx = optax.partition({i: make(**settings[i]) for i in sorted({*groups})}, labels)
    state: Any = tx.init(like_params)
    inner_states = {}
    for i, masked in state.inner_states.items():
        own = {field: _mask(tree, labels, i) for field, tree in trees.items()}
        inner_state = _fill(masked.inner_state, own, saved.steps)
        inner_states[i] = masked._replace(inner_state=inner_state)
    return tx, state._replace(inner_states=inner_states)


def export_state(
    state: Any,
    convert_back: Callable[[PyTree], Any],
    names: state_dicts.Names | None = None,
    *,
    like: Mapping[str, Any],
    learning_rate: LearningRates | None = None,
    lr_scheduler: Mapping[str, Any] | None = None,
    steps_per_scheduler_step: int | None = None,
    strip_prefix: str | Sequence[str] = (),
    optimizer: str | None = None,
) -> dict[str, Any]:
    """Continue a run in ``torch.optim.RMSprop`` or a class with the same state.

    The result is for the optimizer's ``load_state_dict``. The settings are those of
    ``like``.

    Args:
      state: of `rmsprop` or another function of this module, or of an
        ``optax.partition`` of them, for example from `import_state`. The state of
        ``optax_rms.rmsprop`` with a schedule is the same.
      convert_back: the inverse of the ``convert`` of `import_state`: it turns a tree of
        parameters into ``{name: array}``.
      names: as for `import_state`; a mapping if ``like`` has no state.
      like: a state dict of the optimizer that continues the run: the state dict that
        was imported, or that of a new optimizer. Tensors, dtypes and devices are as in
        ``like``, and the result is nested even if ``like`` is flat. Parameters whose
        step in ``like`` is smaller keep the difference.
      learning_rate: the rate to write into the groups: a number or array, a schedule,
        which is evaluated at the number of steps in ``state``, or a list with one for
        each group. ``None`` for the ``lr`` in ``like``.
      lr_scheduler: in place of ``learning_rate``, the state dict of the scheduler that
        belongs to ``like``. The rate is that of the scheduler at the number of steps in
        ``state``.
      steps_per_scheduler_step: as for `import_state`.
      strip_prefix: as for `import_state`.
      optimizer: as for `import_state`.

    Returns:
      A state dict.

    Raises:
      ValueError: naming everything in which the state does not fit ``like``, or all
        arrays with which ``convert_back`` does something else than allowed. A momentum
        with the learning rate inside is refused if the optimizer has the rate outside,
        and the reverse, because the rates of the past would be needed.

    Warns:
      UserWarning: there have been steps since ``like``, a scheduler has been used, as
        ``initial_lr`` in ``like`` shows, and no rate is given.

    Example:
      After a step with a schedule, the group has the rate of the next step:

      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from optax_rms import dialects
      >>> def halve(step):
      ...     return 0.5**step
      >>> tx = dialects.torch.rmsprop(halve)
      >>> weights = {"weight": jnp.ones(2)}
      >>> _, state = tx.update(weights, tx.init(weights))
      >>> new = {  # optimizer.state_dict()
      ...     "state": {},
      ...     "param_groups": [
      ...         {"params": [0], "lr": 1.0, "alpha": 0.9, "eps": 0, "weight_decay": 0}
      ...     ],
      ... }
      >>> exported = dialects.torch.export_state(
      ...     state, dict, {"weight": np.ones(2, "f4")}, like=new, learning_rate=halve
      ... )
      >>> print(exported["param_groups"][0]["lr"], exported["state"][0]["step"])
      0.5 1.0
    """
    check_plain_state("torch.export_state", state)
    saved = state_dicts.read(like, names, optimizer, strip_prefix)
    problems = Problems("the state cannot be exported")
    settings = _settings(
        problems, saved, learning_rate, lr_scheduler, steps_per_scheduler_step
    )
    problems.raise_any()
    leaves, steps = _leaves(state)
    squares = jax.tree.map(lambda leaf: leaf.fields["square_avg"], leaves)
    converter = Converter("convert_back", convert_back, squares)
    names_of_slots = {
        slot: None for leaf in jax.tree.leaves(leaves) for slot in leaf.fields
    }
    columns = {
        slot: converter(slot, jax.tree.map(lambda leaf: leaf.get(slot), leaves))  # noqa: B023
        for slot in names_of_slots
    }
    _check_names(problems, saved, columns["square_avg"])
    problems.raise_any()

    flat = jax.tree.leaves(leaves)
    sources = jax.tree.unflatten(converter.treedef, converter.sources)
    steps_taken = steps - saved.steps
    stored = {}
    for name, parameter in saved.parameters.items():
        arrays = {slot: column[name] for slot, column in columns.items()}
        origins = [flat[i] for i in sources[name]]
        entry = problems.attempt(_to_torch, name, saved, arrays, origins, steps_taken)
        if entry:
            stored[parameter.key] = entry
    problems.raise_any()
    if learning_rate is None and lr_scheduler is None and steps_taken > 0:
        _warn_of_scheduler(
            saved,
            "The rate in like is written, which belongs to an earlier step. Pass the "
            "schedule as learning_rate, or lr_scheduler=scheduler.state_dict()",
        )
    groups = [
        _with_rate(group, own, saved.groups[i], steps)
        for i, (group, own) in enumerate(zip(saved.param_groups, settings, strict=True))
    ]
    return {"state": stored, "param_groups": groups}


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """The state of one leaf of the parameters. No pytree, so that it is a leaf too.

    Attributes:
      fields: arrays by PyTorch's slots. A variance is in place of ``square_avg``, and
        the momentum has the sign of this library.
      lr_in_momentum: whether the momentum contains the learning rate.
    """

    fields: dict[str, Any]
    lr_in_momentum: bool

    def get(self, slot: str) -> Any:
        """The slot, or zeros, which `_check_origin` keeps from being exported."""
        return self.fields.get(slot, jnp.zeros_like(self.fields["square_avg"]))


def _leaves(state: Any) -> tuple[PyTree, int]:
    """A tree of `_Leaf` like the parameters, and the number of steps."""
    if not isinstance(state, optax.PartitionState):
        return _leaves_of_chain(state)
    masked_states: Any = state.inner_states.values()
    trees, steps = zip(
        *(_leaves_of_chain(masked.inner_state) for masked in masked_states), strict=True
    )

    def is_masked(x):
        return isinstance(x, optax.MaskedNode)

    def pick(*leaves):
        return next(leaf for leaf in leaves if not is_masked(leaf))

    return jax.tree.map(pick, *trees, is_leaf=is_masked), steps[0]


def _leaves_of_chain(state: Any) -> tuple[PyTree, int]:
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
    trees = {k: optimizers.join(tree) for k, tree in trees.items() if tree is not None}
    lr_in_momentum = kinds[1] is optax.ScaleByScheduleState

    def leaf(*arrays):
        return _Leaf(dict(zip(trees, arrays, strict=True)), lr_in_momentum)

    return jax.tree.map(leaf, *trees.values()), int(values["count"])


def _check_templates(problems: Problems, saved: state_dicts.StateDict) -> None:
    for name, parameter in saved.parameters.items():
        if parameter.template is None:
            problems.add(
                f"{name!r} had no step yet, so that its shape is unknown; pass "
                "names=dict(model.named_parameters()), or another mapping from names "
                "to parameters"
            )
        elif saved.optimizer != "RMSprop" and np.iscomplexobj(
            reading.to_numpy(parameter.template)
        ):
            problems.add(
                f"{name!r} is complex; {saved.optimizer} squares complex gradients "
                "without taking their modulus, so that its square_avg is of no use"
            )


def _check_names(
    problems: Problems, saved: state_dicts.StateDict, returned: Any
) -> None:
    if not isinstance(returned, Mapping):
        raise ValueError("convert_back must return a mapping from names to arrays")
    for name in saved.parameters.keys() - returned.keys():
        problems.add(f"convert_back returned no {name!r}, which is in like")
    for name in returned.keys() - saved.parameters.keys():
        problems.add(f"convert_back returned {name!r}, which is not in like")


def _settings(
    problems: Problems,
    saved: state_dicts.StateDict,
    learning_rate: LearningRates | None,
    lr_scheduler: Mapping[str, Any] | None,
    steps_per_scheduler_step: int | None,
) -> list[dict[str, Any]]:
    """The settings of the groups, with the learning rates of the arguments."""
    if lr_scheduler is None:
        if steps_per_scheduler_step is not None:
            problems.add("steps_per_scheduler_step has no use without lr_scheduler")
        rates = learning_rate
        if not isinstance(rates, (list, tuple)):
            rates = [learning_rate] * len(saved.groups)
        if len(rates) != len(saved.groups):
            problems.add(
                f"learning_rate must be one, or a list of {len(saved.groups)} for as "
                f"many param_groups, got a list of {len(rates)}"
            )
        for rate in rates:
            if rate is not None:
                problems.attempt(check_learning_rate, "learning_rate", rate)
    elif learning_rate is not None:
        problems.add("learning_rate and lr_scheduler must not both be given")
        rates = []
    else:
        rates = problems.attempt(
            _scheduled_rates, saved, lr_scheduler, steps_per_scheduler_step
        )
    return [
        group if rate is None or not group else group | {"lr": rate}
        for group, rate in zip(saved.groups, rates or [], strict=False)
    ]


def _scheduled_rates(
    saved: state_dicts.StateDict, lr_scheduler: Any, period: int | None
) -> list[LearningRate]:
    """The schedule of each group, as a function of the number of optimizer steps."""
    period = checks.check_steps("steps_per_scheduler_step", period, optional=True)
    steps = saved.steps
    schedulers = schedules.from_state_dict(lr_scheduler, saved.param_groups)
    epoch = schedulers[0].epoch
    if period is None and epoch != steps:
        raise ValueError(
            f"the scheduler has taken {epoch} steps, the optimizer {steps}; pass "
            "steps_per_scheduler_step: 1 if scheduler.step() is called after every "
            "step, or the number of steps after which it is called, for example the "
            "number of batches of an epoch"
        )
    period = period or 1
    if period > 1 and not 0 <= steps - period * epoch <= period:
        raise ValueError(
            f"steps_per_scheduler_step is {period} and the scheduler at {epoch}, so "
            f"that the optimizer must be at {period * epoch} to "
            f"{period * (epoch + 1)} steps, but has taken {steps}. If steps have been "
            "left out, for example by a GradScaler, pass a schedule as learning_rate"
        )
    # Not 0 if the scheduler counts steps that the optimizer has left out, or if its
    # last step was due when the state was saved.
    ahead = epoch - steps // period
    shared: dict[int, LearningRate] = {}
    for i, (scheduler, group) in enumerate(zip(schedulers, saved.groups, strict=True)):
        if group:
            stored = saved.param_groups[i]["lr"]
            _check_rate(f"param_groups[{i}]['lr']", scheduler, stored)

        def rate(count, scheduler=scheduler):
            count = jnp.asarray(count)
            return scheduler.rate(jnp.maximum(count // period + ahead, 0))

        shared.setdefault(id(scheduler), rate)
    return [shared[id(scheduler)] for scheduler in schedulers]


def _check_rate(name: str, scheduler: schedules.Scheduler, stored: Any) -> None:
    """Raise a ``ValueError`` if the scheduler is not at the rate of its optimizer."""
    lr = reading.read_number(name, stored)
    rate = float(scheduler.rate(np.array([max(scheduler.epoch, 0)]))[0])
    # PyTorch multiplies, divides and adds a few times per step, in float64 unless the
    # rate is a tensor.
    precision = jnp.finfo(_dtype(stored) if hasattr(stored, "dtype") else np.float64)
    roundings = 8 * (1 + scheduler.epoch)
    tolerance = roundings * float(precision.eps) * max(scheduler.base, abs(rate))
    if not abs(rate - lr) <= tolerance:
        raise ValueError(
            f"{name} is {lr}, but lr_scheduler gives {rate} at its step "
            f"{scheduler.epoch}. Has the rate been changed by hand, or is it the state "
            "of another scheduler? Pass a schedule as learning_rate"
        )


def _warn_of_scheduler(saved: state_dicts.StateDict, advice: str) -> None:
    scheduled = [
        i
        for i, group in enumerate(saved.param_groups)
        if group["params"] and "initial_lr" in group
    ]
    if scheduled:
        warnings.warn(
            f"param_groups {scheduled} have 'initial_lr', so a scheduler changes the "
            f"learning rate. {advice}.",
            UserWarning,
            stacklevel=3,
        )


def _with_rate(
    group: dict[str, Any], settings: Any, in_like: Any, steps: int
) -> dict[str, Any]:
    """The group, with the rate at this number of steps if the settings have another."""
    if settings is in_like or settings["lr"] is in_like["lr"]:
        return group
    rate = np.asarray(as_schedule(settings["lr"])(jnp.asarray(steps, jnp.int32))).item()
    lr = group["lr"]
    if hasattr(lr, "dtype"):
        return group | {"lr": reading.to_framework(np.full(lr.shape, rate), lr)}
    return group | {"lr": rate}


def _from_torch(
    parameter: state_dicts.Parameter,
    settings: dict[str, Any],
    saved: state_dicts.StateDict,
) -> Arrays:
    """The fields of a parameter: as after ``init`` if PyTorch has no state for it."""
    blank = np.zeros_like(reading.to_numpy(parameter.template))
    own = {
        slot: parameter.slots.get(slot, blank)
        for slot in state_dicts.slots_of(settings)
    }
    if not parameter.slots:
        start = state_dicts.SQUARE_AVG_STARTS[saved.optimizer]
        own["square_avg"] = np.full_like(blank, start)
    return slots.to_fields(
        own, _FIELDS, negate_momentum=settings.get("lr_in_momentum", False)
    )


def _field(column: Arrays, field: str) -> np.ndarray:
    """A field of a parameter, or a placeholder if only other groups have the field."""
    others = {"nu": "variance", "variance": "nu"}
    any_of = column.get("nu", column.get("variance"))
    return column.get(field, column.get(others.get(field, ""), np.zeros_like(any_of)))


def _to_torch(
    name: Any,
    saved: state_dicts.StateDict,
    arrays: Arrays,
    origins: Sequence[_Leaf],
    steps_taken: int,
) -> dict[str, Any]:
    """The state that PyTorch has for a parameter: none, if it had no step.

    ``arrays`` are as in `_Leaf`, from ``origins``; ``steps_taken`` since ``like``.
    """
    parameter = saved.parameters[name]
    settings = saved.groups[parameter.group]
    for origin in origins:
        _check_origin(name, parameter, settings, arrays, origin)
    own = {slot: arrays[slot] for slot in state_dicts.slots_of(settings)}
    square, *others = own.values()
    start = state_dicts.SQUARE_AVG_STARTS[saved.optimizer]
    is_blank = np.all(square == start) and not any(map(np.any, others))
    if is_blank and not parameter.slots:
        return {}
    _check_template(name, parameter, square)
    if (step := parameter.step + steps_taken) < 0:
        raise ValueError(f"{name!r} in like has had more steps than the state")

    template = parameter.template
    dtype = _dtype(template)
    square_field = "variance" if settings["centered"] else "nu"
    fields = {_FIELDS[slot]: array for slot, array in own.items()}
    fields[square_field] = fields.pop("nu")
    stored = slots.to_slots(
        fields, _FIELDS, dtype, negate_momentum=settings.get("lr_in_momentum", False)
    )
    for slot, array in stored.items():
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{slot} of {name!r} is not finite in {dtype}")
    # Slots of zeros that no step uses, where code shares the state between processes.
    unused = parameter.stored.keys() & {*state_dicts.SLOTS} - stored.keys()
    stored |= {slot: np.zeros_like(square, dtype) for slot in unused}
    return {
        "step": _step_like(step, parameter),
        **{
            slot: reading.to_framework(stored[slot], template)
            for slot in state_dicts.SLOTS
            if slot in stored
        },
    }


def _check_origin(
    name: Any,
    parameter: state_dicts.Parameter,
    settings: Mapping[str, Any],
    arrays: Arrays,
    origin: _Leaf,
) -> None:
    """Raise a ``ValueError`` if a leaf lacks a slot that its group needs."""
    needed = state_dicts.slots_of(settings)
    if origin.fields.keys() != set(needed):
        raise ValueError(
            f"{name!r} is in param_groups[{parameter.group}] of like, with momentum "
            f"{settings['momentum']} and centered {settings['centered']}, which needs "
            f"{needed}, but the state has {list(origin.fields)}"
        )
    inside = settings.get("lr_in_momentum", False)
    has_momentum = np.any(arrays.get("momentum_buffer", 0))
    if has_momentum and origin.lr_in_momentum != inside:
        has, needs = ("lacks", "with") if inside else ("has", "without")
        raise ValueError(
            f"the momentum of {name!r} {has} the learning rate as a factor, and the "
            f"optimizer of like needs it {needs}. It sums up steps of different "
            "learning rates, so no factor converts it. Train here with the dialect of "
            "like, or set the trace to 0"
        )


def _check_template(
    name: Any, parameter: state_dicts.Parameter, array: np.ndarray
) -> None:
    """Raise a ``ValueError`` if the parameter is unknown, or another than the array."""
    if parameter.template is None:
        raise ValueError(
            f"{name!r} has no state in like from which to take shape and dtype; pass "
            "names=dict(model.named_parameters()), or another mapping from names to "
            "parameters"
        )
    like = reading.to_numpy(parameter.template)
    if array.shape != like.shape or np.iscomplexobj(array) != np.iscomplexobj(like):
        raise ValueError(
            f"{name!r} must be {reading.describe(like)} as in like, but convert_back "
            f"returned {reading.describe(array)}"
        )


def _step_like(step: int, parameter: state_dicts.Parameter) -> Any:
    """A step count in the form of ``like``, for example a tensor, or in PyTorch's."""
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
    """The state of a chain with these fields in place of those from ``init``."""
    fields = {field: optimizers.split(tree) for field, tree in trees.items()}
    # Each group's own: one array in two places could not be donated.
    count = jnp.array(steps, jnp.int32)
    return chain_state.with_fields(state, fields | {"count": count})


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
