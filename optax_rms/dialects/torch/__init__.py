# SPDX-License-Identifier: Apache-2.0
"""RMSProp of PyTorch, timm, stable-baselines3 and pfrl; import and export of runs."""

from optax_rms.dialects.torch._handover import export_state, import_state
from optax_rms.dialects.torch._optimizers import (
    RealAndImaginary,
    rmsprop,
    rmsprop_eps_inside_sqrt,
    rmsprop_tf,
    rmsprop_tf_like,
)

__all__ = [
    "RealAndImaginary",
    "export_state",
    "import_state",
    "rmsprop",
    "rmsprop_eps_inside_sqrt",
    "rmsprop_tf",
    "rmsprop_tf_like",
]
