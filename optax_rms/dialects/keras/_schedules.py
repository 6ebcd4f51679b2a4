# SPDX-License-Identifier: Apache-2.0
"""Keras' learning-rate schedules, from their configuration, as functions of the step.

A schedule object of Keras computes with the backend of Keras, which JAX cannot trace
unless the backend is JAX; and a file holds only the configuration.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms._types import Number

Schedule = Callable[[Any], jax.Array]


def _as_float(step: ArrayLike) -> jax.Array:
    return jnp.asarray(step).astype(jnp.result_type(float))


def _full_periods(step: jax.Array, period: float) -> tuple[jax.Array, jax.Array]:
    """How many periods have ended, and how many have begun, after a step."""
    # Neither floor nor ceil of the quotient: a compiler may turn a division by a
    # constant into a product, which can end up beside the whole number.
    nearest = jnp.round(step / period)
    end = nearest * period
    ended = jnp.where(end > step, nearest - 1, nearest)
    return ended, jnp.where(end < step, nearest + 1, nearest)


def _periods(step: ArrayLike, decay_steps: float, staircase: bool) -> jax.Array:
    step = _as_float(step)
    return _full_periods(step, decay_steps)[0] if staircase else step / decay_steps


def exponential_decay(
    initial_learning_rate: Number,
    decay_steps: float,
    decay_rate: float,
    staircase: bool = False,
) -> Schedule:
    def schedule(step):
        periods = _periods(step, decay_steps, staircase)
        return initial_learning_rate * jnp.power(decay_rate, periods)

    return schedule


def _inverse_time_decay(
    initial_learning_rate: Number,
    decay_steps: float,
    decay_rate: float,
    staircase: bool = False,
) -> Schedule:
    def schedule(step):
        periods = _periods(step, decay_steps, staircase)
        return initial_learning_rate / (1 + decay_rate * periods)

    return schedule


def _piecewise_constant_decay(boundaries: list[float], values: list[float]) -> Schedule:
    if len(values) != len(boundaries) + 1 or sorted(set(boundaries)) != boundaries:
        raise ValueError(
            "PiecewiseConstantDecay needs increasing boundaries and one value more "
            f"than boundaries, got {boundaries} and {values}."
        )

    def schedule(step):
        # A value holds up to and including its boundary.
        piece = jnp.sum(_as_float(step) > jnp.array(boundaries))
        return jnp.array(values, jnp.result_type(float))[piece]

    return schedule


def _polynomial_decay(
    initial_learning_rate: Number,
    decay_steps: float,
    end_learning_rate: float = 1e-4,
    power: float = 1.0,
    cycle: bool = False,
) -> Schedule:
    def schedule(step):
        step = _as_float(step)
        if cycle:
            _, begun = _full_periods(step, decay_steps)
            total = decay_steps * jnp.maximum(1, begun)
        else:
            step, total = jnp.minimum(step, decay_steps), decay_steps
        remaining = jnp.power(1 - step / total, power)
        return (initial_learning_rate - end_learning_rate) * remaining + (
            end_learning_rate
        )

    return schedule


def _cosine(fraction: jax.Array, alpha: float) -> jax.Array:
    return (1 - alpha) * 0.5 * (1 + jnp.cos(math.pi * fraction)) + alpha


def _cosine_decay(
    initial_learning_rate: Number,
    decay_steps: float,
    alpha: float = 0.0,
    warmup_target: float | None = None,
    warmup_steps: float = 0,
) -> Schedule:
    target: Number = initial_learning_rate
    if warmup_target is None:
        # Keras ignores warmup_steps then.
        warmup_steps = 0
    else:
        target = warmup_target

    def schedule(step):
        step = _as_float(step)
        decayed = jnp.clip((step - warmup_steps) / decay_steps, 0, 1)
        decaying = target * _cosine(decayed, alpha)
        if not warmup_steps:
            return decaying
        slope = (target - initial_learning_rate) / warmup_steps
        warming = initial_learning_rate + slope * step
        return jnp.where(step < warmup_steps, warming, decaying)

    return schedule


def _cosine_decay_restarts(
    initial_learning_rate: Number,
    first_decay_steps: float,
    t_mul: float = 2.0,
    m_mul: float = 1.0,
    alpha: float = 0.0,
) -> Schedule:
    def schedule(step):
        step = _as_float(step)
        fraction = step / first_decay_steps
        if t_mul == 1:
            restarts, _ = _full_periods(step, first_decay_steps)
            fraction = fraction - restarts
        else:
            # The lengths of the periods are a geometric series.
            restarts = jnp.floor(
                jnp.log(1 + fraction * (t_mul - 1)) / jnp.log(_as_float(t_mul))
            )
            length = jnp.power(t_mul, restarts)
            fraction = (fraction - (length - 1) / (t_mul - 1)) / length
        amplitude = jnp.power(m_mul, restarts)
        cosine = amplitude * _cosine(fraction, 0)
        return initial_learning_rate * ((1 - alpha) * cosine + alpha)

    return schedule


_SCHEDULES = {
    "CosineDecay": _cosine_decay,
    "CosineDecayRestarts": _cosine_decay_restarts,
    "ExponentialDecay": exponential_decay,
    "InverseTimeDecay": _inverse_time_decay,
    "PiecewiseConstantDecay": _piecewise_constant_decay,
    "PolynomialDecay": _polynomial_decay,
}


def from_object(schedule: Any) -> Callable[[Any], Any]:
    """Return a schedule that JAX can trace; a schedule of a user's class, as it is."""
    cls = type(schedule)
    is_own = cls.__module__.partition(".")[0] in ("keras", "tf_keras")
    if is_own and cls.__name__ in _SCHEDULES:
        return from_config(
            {"class_name": cls.__name__, "config": schedule.get_config()}
        )
    return schedule


def from_config(serialized: Any) -> Schedule:
    """Return the schedule that ``keras.optimizers.schedules.serialize`` was given.

    Raises:
      ValueError: the class is not Keras' own, or its configuration is damaged.
    """
    parts = dict(serialized) if isinstance(serialized, Mapping) else {}
    name, config = parts.get("class_name"), parts.get("config")
    # tf.keras does not always write the module of its own classes; that of a class of
    # the user's is None, or another one.
    module = str(parts.get("module", "keras.optimizers.schedules"))
    is_own = module.startswith("keras.") and not parts.get("registered_name")
    if name not in _SCHEDULES or not is_own or not isinstance(config, Mapping):
        got = f"the class {name}" if name else repr(serialized)
        raise ValueError(
            "learning_rate must be a number or one of Keras' own schedules, which are "
            f"{', '.join(_SCHEDULES)}, got {got}. Pass learning_rate yourself, for "
            "example learning_rate=lambda count: 0.01 * 0.5 ** (count / 1000)."
        )
    try:
        arguments = {k: _check(k, v) for k, v in config.items() if k != "name"}
        return _SCHEDULES[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"learning_rate, a {name}: {error}") from error


def _check(key: str, value: Any) -> Any:
    if key in ("cycle", "staircase"):
        return checks.check_flag(key, value)
    if key == "warmup_target" and value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [checks.check_number(key, number, -math.inf) for number in value]
    if key in ("decay_steps", "first_decay_steps"):
        return checks.check_number(key, value, exclude_low=True)
    return checks.check_number(key, value, -math.inf)
