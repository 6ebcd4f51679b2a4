# SPDX-License-Identifier: Apache-2.0
"""RMSProp of TensorFlow, and import and export of its optimizer states."""

from optax_rms.dialects.tensorflow._handover import export_state as export_state
from optax_rms.dialects.tensorflow._handover import import_state as import_state
from optax_rms.dialects.tensorflow._optimizers import (
    legacy_keras_rmsprop as legacy_keras_rmsprop,
)
from optax_rms.dialects.tensorflow._optimizers import rmsprop as rmsprop

__all__ = ["export_state", "import_state", "legacy_keras_rmsprop", "rmsprop"]
