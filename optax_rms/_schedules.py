# SPDX-License-Identifier: Apache-2.0
"""Learning rates: a number, an array or a schedule."""

from typing import Any

from optax_rms import _checks as checks
from optax_rms._types import LearningRate, Number, Schedule


def check_learning_rate(name: str, value: LearningRate, *, hint: str = "") -> Any:
    """Return a schedule as it is, and a number or array as `check_number` does."""
    return value if callable(value) else checks.check_number(name, value, hint=hint)


def as_schedule(learning_rate: Number | Schedule) -> Schedule:
    """A schedule, of a number or an array the constant one."""
    if callable(learning_rate):
        return learning_rate
    return lambda count: learning_rate
