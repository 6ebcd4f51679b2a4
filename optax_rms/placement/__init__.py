# SPDX-License-Identifier: Apache-2.0
"""Where the state of any Optax optimizer lies, and in how many loops it is read."""

from optax_rms.placement._one_pass import one_pass
from optax_rms.placement._shard_state import shard_state
from optax_rms.placement._state_shardings import state_shardings

__all__ = [
    "one_pass",
    "shard_state",
    "state_shardings",
]
