# SPDX-License-Identifier: Apache-2.0
"""PyTorch's learning-rate schedulers, read from their state dicts.

They become functions of the epoch, which is PyTorch's ``last_epoch``: the number of
calls of ``scheduler.step()``. A state dict does not name the class of its scheduler,
but each class has its own keys.

PyTorch computes each rate from the rate before. The rates of a single scheduler have a
closed form, `Scheduler.rate`. In a ``ChainedScheduler`` several schedulers change one
rate in turn, and the closed forms do not hold: there `Scheduler.recursion` is used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_rms.dialects._shared import reading

Array = Any
EpochFunction = Callable[[Array], Array]


class Scheduler(NamedTuple):
    """A scheduler for one parameter group.

    The functions take an int32 scalar of JAX, or an array of NumPy for float64.

    Attributes:
      epoch: the epoch at which the scheduler was saved.
      base: the rate of the group before any scheduler.
      rate: the learning rate at an epoch, at least 0.
      recursion: two numbers ``a`` and ``b``. The step to an epoch turns ``rate`` into
        ``rate * a + b``. PyTorch takes the step to epoch 0 in the constructor.
      life: the epoch at which the last change of the rate or the first period ends.
      factor: ``rate`` as a multiple of the base rate, if no step adds anything.
      overwrites: whether ``a`` is 0 at every epoch.
    """

    epoch: int
    base: float
    rate: EpochFunction
    recursion: Callable[[Array], tuple[Array, Array]]
    life: int
    factor: EpochFunction | None = None
    overwrites: bool = False


def from_state_dict(
    state_dict: Any, param_groups: Sequence[Mapping[str, Any]]
) -> list[Scheduler]:
    """Return a scheduler for each group. Groups with the same rates share a scheduler.

    Args:
      state_dict: the result of ``scheduler.state_dict()``.
      param_groups: the groups in the state dict of the optimizer.

    Raises:
      ValueError: the class of the scheduler is not in `NAMES`, or the state is damaged.
    """
    shared: dict[str, Scheduler] = {}
    schedulers = []
    for i, group in enumerate(param_groups):
        own = _of_group("lr_scheduler", state_dict, i, len(param_groups))
        # OneCycleLR keeps these in the groups.
        cycle = {
            key: reading.read_number(f"param_groups[{i}][{key!r}]", group[key])
            for key in ("max_lr", "min_lr")
            if key in group
        }
        key = repr((own, cycle))
        if key not in shared:
            shared[key] = _scheduler("lr_scheduler", own, cycle)
        schedulers.append(shared[key])
    return schedulers


_ADVICE = (
    "Pass learning_rate, a number or a schedule of the number of optimizer steps, in "
    "place of lr_scheduler"
)
# By a key that only the scheduler's state dict has: its name, and what to do.
_REFUSED = {
    "lr_lambdas": (
        "LambdaLR or MultiplicativeLR, whose functions are not in the state dict",
        f"{_ADVICE}; for LambdaLR, learning_rate=lambda step: initial_lr * f(step). "
        "The schedules of transformers are LambdaLR; Optax has, for example, "
        "optax.linear_schedule and optax.warmup_cosine_decay_schedule",
    ),
    "patience": (
        "ReduceLROnPlateau, whose rate depends on a metric",
        f"{_ADVICE}, or use optax.contrib.reduce_on_plateau",
    ),
    "max_lrs": ("CyclicLR", _ADVICE),
    "anneal_epochs": ("SWALR", _ADVICE),
    "base_values": ("a scheduler of timm", _ADVICE),
}
_PRIVATE = {"_schedulers", "_milestones", "_schedule_phases", "_anneal_func_type"}


def _of_group(where: str, state_dict: Any, group: int, groups: int) -> dict[str, Any]:
    """Return the state dict with the rate of one group as ``base_lrs``."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"{where} must be what scheduler.state_dict() returned, got "
            f"{str(state_dict)[:50]!r} of type {type(state_dict).__name__}"
        )
    for key, (name, advice) in _REFUSED.items():
        if key in state_dict:
            raise ValueError(f"{where} is the state of {name}. {advice}")
    own = {k: v for k, v in state_dict.items() if k[0] != "_" or k in _PRIVATE}
    for key in ("verbose", "use_beta1"):
        own.pop(key, None)
    if "_schedulers" in own:
        own["_schedulers"] = [
            _of_group(f"{where}['_schedulers'][{i}]", child, group, groups)
            for i, child in enumerate(own["_schedulers"])
        ]
        return own
    rates = own.get("base_lrs")
    if not isinstance(rates, list | tuple) or len(rates) != groups:
        raise ValueError(
            f"{where} must have a list of {groups} base_lrs for as many param_groups, "
            f"got {rates!r}. Is it the state of a scheduler of this optimizer?"
        )
    name = f"{where}['base_lrs'][{group}]"
    return own | {"base_lrs": reading.read_number(name, rates[group])}


def _scheduler(where: str, own: Mapping[str, Any], cycle: Any) -> Scheduler:
    """Return the scheduler of a state dict of `_of_group`."""
    if "_schedulers" in own:
        children = [
            _scheduler(f"{where}['_schedulers'][{i}]", child, cycle)
            for i, child in enumerate(own["_schedulers"])
        ]
        if "_milestones" in own:
            return _sequential_lr(children, own["_milestones"], _epoch(where, own))
        return _chained_scheduler(where, children)
    keys = own.keys() - {"base_lrs", "last_epoch"}
    name = next((name for name, known in _KEYS.items() if keys == known), None)
    if name is None:
        raise ValueError(
            f"{where} has the keys {sorted(keys)}, and no scheduler that is read has "
            f"them. Schedulers that are read: {', '.join(NAMES)}. {_ADVICE}"
        )
    numbers = {
        key: _whole(
            reading.read_number(
                f"{where}[{key!r}]", own[key], exclude_low=key in _POSITIVE
            )
        )
        for key in keys - _NO_NUMBERS
    }
    return _BUILDERS[name](
        where, {**own, **numbers, "last_epoch": _epoch(where, own), "cycle": cycle}
    )


def _epoch(where: str, own: Mapping[str, Any]) -> int:
    # In a SequentialLR, a scheduler that has not begun yet is at a negative epoch.
    epoch = own.get("last_epoch")
    return int(reading.read_number(f"{where}['last_epoch']", epoch, low=-math.inf))


# Schedulers that multiply the base rate by a factor.


def _step_lr(where: str, own: Any) -> Scheduler:
    gamma, size = own["gamma"], own["step_size"]
    return _of_factor(own, lambda epoch: _power(gamma, epoch // size), 0)


def _multi_step_lr(where: str, own: Any) -> Scheduler:
    counts = own["milestones"]
    # A collections.Counter in PyTorch; a file of JSON has text for its keys.
    milestones = sorted(
        int(milestone) for milestone, n in counts.items() for _ in range(int(n))
    )

    def factor(epoch):
        xp = _module(epoch)
        passed = xp.searchsorted(xp.asarray(milestones, epoch.dtype), epoch, "right")
        return _power(own["gamma"], passed)

    return _of_factor(own, factor, max(milestones, default=0))


def _constant_lr(where: str, own: Any) -> Scheduler:
    total = own["total_iters"]

    def factor(epoch):
        reduced = _module(epoch).full_like(_real(epoch), own["factor"])
        return _module(epoch).where(epoch < total, reduced, 1)

    return _of_factor(own, factor, total)


def _linear_lr(where: str, own: Any) -> Scheduler:
    start, end, total = own["start_factor"], own["end_factor"], own["total_iters"]
    return _of_factor(
        own, lambda epoch: end + (start - end) * _remaining(epoch, total), total
    )


def _exponential_lr(where: str, own: Any) -> Scheduler:
    return _of_factor(own, lambda epoch: _power(own["gamma"], epoch), 0)


def _polynomial_lr(where: str, own: Any) -> Scheduler:
    total, power = own["total_iters"], float(own["power"])
    return _of_factor(own, lambda epoch: _remaining(epoch, total) ** power, total)


def _of_factor(own: Any, factor: EpochFunction, life: float) -> Scheduler:
    base = own["base_lrs"]

    def recursion(epoch):
        xp = _module(epoch)
        before = xp.where(epoch > 0, factor(xp.maximum(epoch - 1, 0)), 1)
        # PyTorch multiplies no more after a factor of 0, with which a decay ends.
        ratio = factor(epoch) / xp.where(before == 0, 1, before)
        ratio = xp.where(before == 0, 1, ratio)
        return ratio, xp.zeros_like(ratio)

    return Scheduler(
        own["last_epoch"],
        base,
        lambda epoch: base * factor(epoch),
        recursion,
        math.ceil(life),
        factor=factor,
    )


# Schedulers whose steps add a number, or that do not look at the rate before.


def _cosine_annealing_lr(where: str, own: Any) -> Scheduler:
    base, low, half = own["base_lrs"], own["eta_min"], own["T_max"]

    def since_lowest(epoch):
        """The epochs since the rate was ``eta_min``, at T_max, 3 T_max, and so on."""
        return ((epoch if isinstance(half, int) else _real(epoch)) + half) % (2 * half)

    def height(epoch):
        since = since_lowest(epoch)
        return _wave(_real(_module(epoch).minimum(since, 2 * half - since)) / half)

    def recursion(epoch):
        xp = _module(epoch)
        before = height(xp.maximum(epoch - 1, 0))
        was_lowest = (since_lowest(epoch - 1) == 0) & (epoch > 0)
        ratio = xp.where(epoch > 0, height(epoch) / xp.where(was_lowest, 1, before), 1)
        ratio = xp.where(was_lowest, 1, ratio)
        added = xp.where(was_lowest, (base - low) * height(epoch), low * (1 - ratio))
        return ratio, added

    return Scheduler(
        own["last_epoch"],
        base,
        lambda epoch: low + (base - low) * height(epoch),
        recursion,
        math.ceil(2 * half),
    )


def _cosine_annealing_warm_restarts(where: str, own: Any) -> Scheduler:
    base, low = own["base_lrs"], own["eta_min"]
    first, growth, epoch = own["T_0"], own["T_mult"], own["last_epoch"]
    starts, lengths = [0], [first]
    while growth > 1 and starts[-1] + lengths[-1] < 2**31:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * growth)

    def since_restart(epoch):
        xp = _module(epoch)
        table = xp.asarray(starts, epoch.dtype)
        period = xp.searchsorted(table, epoch, "right") - 1
        since = epoch - table[period]
        return period, since % first if growth == 1 else since

    def rate(epoch):
        period, since = since_restart(epoch)
        length = _real(_module(epoch).asarray(np.asarray(lengths, np.float32)))[period]
        return low + (base - low) * _wave(1 - _real(since) / length)

    periods, sinces = since_restart(np.array([max(epoch, 0)]))
    expected = (int(sinces[0]), lengths[int(periods[0])])
    if (own["T_cur"], own["T_i"]) != expected:
        raise ValueError(
            f"{where} has T_cur {own['T_cur']} and T_i {own['T_i']}, but at last_epoch "
            f"{epoch} they are {expected[0]} and {expected[1]} if every step is of one "
            f"epoch. No count of steps tells steps of fractions. {_ADVICE}"
        )
    return Scheduler(epoch, base, rate, _overwriting(rate), first, overwrites=True)


def _one_cycle_lr(where: str, own: Any) -> Scheduler:
    if own["cycle_momentum"]:
        raise ValueError(
            f"{where} is the state of OneCycleLR with cycle_momentum=True, which also "
            "changes the momentum at every step; here the momentum is constant. Train "
            f"with cycle_momentum=False. {_ADVICE}, if the momentum may stay as it is"
        )
    rates = {"initial_lr": own["base_lrs"], **own["cycle"]}
    total, phases = int(own["total_steps"]), own["_schedule_phases"]
    if missing := {"max_lr", "min_lr"} - rates.keys():
        raise ValueError(
            f"{where} is the state of OneCycleLR, but param_groups have no "
            f"{sorted(missing)}. Is it the state of a scheduler of this optimizer?"
        )
    anneal = {"cos": _wave, "linear": lambda x: x}[own["_anneal_func_type"]]
    ends = [float(phase["end_step"]) for phase in phases]

    def rate(epoch):
        xp = _module(epoch)
        # PyTorch raises an error after total_steps. Here the rate stays the last.
        epoch = _real(xp.minimum(epoch, total))
        value = xp.zeros_like(epoch)
        for i, begin in reversed(list(enumerate([0.0, *ends[:-1]]))):
            start, end = (rates[phases[i][key]] for key in ("start_lr", "end_lr"))
            own_rate = end + (start - end) * anneal(
                (ends[i] - epoch) / (ends[i] - begin)
            )
            is_over = (epoch > ends[i]) & (i + 1 < len(ends))
            value = xp.where(is_over, value, own_rate)
        return value

    return Scheduler(
        own["last_epoch"],
        own["base_lrs"],
        rate,
        _overwriting(rate),
        total,
        overwrites=True,
    )


def _overwriting(rate: EpochFunction) -> Callable[[Array], tuple[Array, Array]]:
    def recursion(epoch):
        value = rate(epoch)
        return _module(epoch).zeros_like(value), value

    return recursion


# Schedulers of schedulers.


def _sequential_lr(
    children: list[Scheduler], milestones: Sequence[int], epoch: int
) -> Scheduler:
    """The schedulers in turn. Each begins with its epoch 0 at a milestone."""
    starts = [0, *map(int, milestones)]
    active = sum(start <= epoch for start in starts[1:])
    # The present scheduler may have begun at another epoch than that of its milestone,
    # but its state has its epoch.
    starts[active] = epoch - children[active].epoch

    def select(epoch, functions):
        xp = _module(epoch)
        chosen = functions[0](xp.maximum(epoch - starts[0], 0))
        for function, start, milestone in zip(
            functions[1:], starts[1:], milestones, strict=True
        ):
            value = function(xp.maximum(epoch - start, 0))
            chosen = xp.where(epoch >= milestone, value, chosen)
        return chosen

    def rate(epoch):
        return select(epoch, [child.rate for child in children])

    def ratio(child):
        # A scheduler begins with its own rate, whatever the rate was before.
        return lambda own: _module(own).where(own == 0, 0, child.recursion(own)[0])

    def added(child):
        return lambda own: _module(own).where(
            own == 0, child.rate(own), child.recursion(own)[1]
        )

    def recursion(epoch):
        return (
            select(epoch, [ratio(child) for child in children]),
            select(epoch, [added(child) for child in children]),
        )

    life = starts[-1] + children[-1].life
    return Scheduler(epoch, children[0].base, rate, recursion, life)


def _chained_scheduler(where: str, children: list[Scheduler]) -> Scheduler:
    """All schedulers in turn, each on the rate that the one before has left."""
    epochs = [child.epoch for child in children]
    if len(set(epochs)) > 1:
        raise ValueError(
            f"{where} is the state of a ChainedScheduler whose schedulers are at the "
            f"epochs {epochs}, and must be at one. {_ADVICE}"
        )
    life = max(child.life for child in children)

    def recursion(epoch):
        a, b = 1.0, 0.0
        for child in children:
            ratio, added = child.recursion(epoch)
            a, b = a * ratio, b * ratio + added
        return a, b

    factors = [child.factor for child in children if child.factor]
    base, factor = children[0].base, None
    overwrites = any(child.overwrites for child in children)
    if overwrites:
        rate = lambda epoch: recursion(epoch)[1]  # noqa: E731
    elif len(factors) == len(children):
        factor = lambda epoch: math.prod(f(epoch) for f in factors)  # noqa: E731
        rate = lambda epoch: base * factor(epoch)  # noqa: E731
    else:
        rate = _iterated(recursion, base, life)
    return Scheduler(epochs[0], base, rate, recursion, life, factor, overwrites)


def _iterated(recursion: Any, base: float, life: int) -> EpochFunction:
    """The rate by the recursion: from a table up to ``life``, then step by step."""
    rates = [base]
    for a, b in zip(*recursion(np.arange(life + 1)), strict=True):
        rates.append(rates[-1] * float(a) + float(b))
    known = np.asarray(rates[1:])

    def rate(epoch):
        if isinstance(epoch, np.ndarray):
            return known[epoch]
        table = jnp.asarray(known, jnp.result_type(float))

        def advance(epoch, rate):
            a, b = recursion(epoch)
            return (rate * a + b).astype(table.dtype)

        first = table[jnp.minimum(epoch, life)]
        return jax.lax.fori_loop(
            jnp.asarray(life + 1, epoch.dtype), epoch + 1, advance, first
        )

    return rate


# Numerics of the epoch, in NumPy and in JAX.


def _module(epoch: Array) -> Any:
    return np if isinstance(epoch, np.ndarray) else jnp


def _real(epoch: Array) -> Array:
    is_numpy = isinstance(epoch, np.ndarray)
    return epoch.astype(np.float64 if is_numpy else jnp.result_type(float))


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _power(base: float, exponent: Array) -> Array:
    # The base in float32 has a rounding error that its power multiplies: by 100000 for
    # 0.99999 ** 100000, which would be off by 0.1 %.
    return _module(exponent).exp(_real(exponent) * math.log(base))


def _remaining(epoch: Array, total: float) -> Array:
    """The share of ``total`` epochs that is left."""
    return _real(total - _module(epoch).minimum(epoch, total)) / total


def _wave(x: Array) -> Array:
    """``(1 - cos(pi x)) / 2``, without the cancellation near 0."""
    return _module(x).square(_module(x).sin(math.pi / 2 * x))


_KEYS = {
    "StepLR": {"step_size", "gamma"},
    "MultiStepLR": {"milestones", "gamma"},
    "ConstantLR": {"factor", "total_iters"},
    "LinearLR": {"start_factor", "end_factor", "total_iters"},
    "ExponentialLR": {"gamma"},
    "PolynomialLR": {"total_iters", "power"},
    "CosineAnnealingLR": {"T_max", "eta_min"},
    "CosineAnnealingWarmRestarts": {"T_0", "T_i", "T_mult", "T_cur", "eta_min"},
    "OneCycleLR": {"total_steps", "cycle_momentum"}
    | {"_schedule_phases", "_anneal_func_type"},
}
_BUILDERS = {
    "StepLR": _step_lr,
    "MultiStepLR": _multi_step_lr,
    "ConstantLR": _constant_lr,
    "LinearLR": _linear_lr,
    "ExponentialLR": _exponential_lr,
    "PolynomialLR": _polynomial_lr,
    "CosineAnnealingLR": _cosine_annealing_lr,
    "CosineAnnealingWarmRestarts": _cosine_annealing_warm_restarts,
    "OneCycleLR": _one_cycle_lr,
}
_NO_NUMBERS = {"milestones", "cycle_momentum"} | _PRIVATE
_POSITIVE = {"step_size", "T_max", "T_0", "T_mult", "total_steps", "total_iters"}
_POSITIVE |= {"gamma"}
NAMES = [*_KEYS, "SequentialLR", "ChainedScheduler"]
