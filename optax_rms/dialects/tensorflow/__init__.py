# SPDX-License-Identifier: Apache-2.0
"""RMSProp as TensorFlow has it, and runs handed over from and to its checkpoints."""

from optax_rms.dialects.tensorflow._handover import export_state as export_state
from optax_rms.dialects.tensorflow._handover import import_state as import_state
from optax_rms.dialects.tensorflow._optimizers import (
    legacy_keras_rmsprop as legacy_keras_rmsprop,
)
from optax_rms.dialects.tensorflow._optimizers import rmsprop as rmsprop
