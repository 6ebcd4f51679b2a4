# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedules that several recipes share."""

import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms.dialects.keras import _schedules as keras_schedules


def linear_to_zero(learning_rate: ArrayLike, total_steps: int) -> optax.Schedule:
    """Fall from ``learning_rate`` at step 0 to 0 at ``total_steps``."""
    learning_rate = checks.check_number("learning_rate", learning_rate)
    total_steps = checks.check_steps("total_steps", total_steps)
    return optax.linear_schedule(learning_rate, 0.0, total_steps)


def staircase(learning_rate: ArrayLike, period: float, factor: float) -> optax.Schedule:
    """Multiply by ``factor`` whenever another ``period`` of steps has passed."""
    learning_rate = checks.check_number("learning_rate", learning_rate)
    return keras_schedules.exponential_decay(
        learning_rate, period, factor, staircase=True
    )
