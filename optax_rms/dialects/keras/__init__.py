# SPDX-License-Identifier: Apache-2.0
"""RMSProp as Keras 3 has it, and runs handed over from and to Keras."""

from optax_rms.dialects.keras._handover import export_state as export_state
from optax_rms.dialects.keras._handover import import_state as import_state
from optax_rms.dialects.keras._optimizers import RMSpropState as RMSpropState
from optax_rms.dialects.keras._optimizers import rmsprop as rmsprop
