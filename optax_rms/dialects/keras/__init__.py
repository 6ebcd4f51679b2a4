# SPDX-License-Identifier: Apache-2.0
"""RMSProp of Keras 3 and of tf.keras from 2.11 on, and import and export of states."""

from optax_rms.dialects.keras._handover import export_state as export_state
from optax_rms.dialects.keras._handover import import_state as import_state
from optax_rms.dialects.keras._optimizers import RMSpropState as RMSpropState
from optax_rms.dialects.keras._optimizers import rmsprop as rmsprop

__all__ = ["RMSpropState", "export_state", "import_state", "rmsprop"]
