# SPDX-License-Identifier: Apache-2.0
"""RMSProp for JAX: exact, in every framework's dialect, and hard to break."""

from optax_rms._rmsprop import rmsprop as rmsprop
from optax_rms._scale_by_rms import ScaleByStddevState as ScaleByStddevState
from optax_rms._scale_by_rms import scale_by_rms as scale_by_rms
