# SPDX-License-Identifier: Apache-2.0
"""RMSProp as PyTorch and timm have it, and runs handed over from and to them."""

from optax_rms.dialects.torch._handover import export_state as export_state
from optax_rms.dialects.torch._handover import import_state as import_state
from optax_rms.dialects.torch._optimizers import RealAndImaginary as RealAndImaginary
from optax_rms.dialects.torch._optimizers import rmsprop as rmsprop
from optax_rms.dialects.torch._optimizers import rmsprop_tf as rmsprop_tf
