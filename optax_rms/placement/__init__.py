# SPDX-License-Identifier: Apache-2.0
"""Where the state of any Optax optimizer lies on a mesh of devices."""

from optax_rms.placement._state_shardings import state_shardings

__all__ = [
    "state_shardings",
]
