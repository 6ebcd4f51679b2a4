# SPDX-License-Identifier: Apache-2.0
"""Types that several modules share."""

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

PyTree = Any
Number = float | jax.Array
Schedule = Callable[[Any], ArrayLike]
LearningRate = ArrayLike | Schedule
