# SPDX-License-Identifier: Apache-2.0
"""Moments and weights of any Optax optimizer in fewer bytes."""

from optax_rms.storage._compress_state import CompressState as CompressState
from optax_rms.storage._compress_state import compress_state as compress_state
from optax_rms.storage._compress_state import decompress_state as decompress_state
from optax_rms.storage._compress_state import recompress_state as recompress_state
from optax_rms.storage._formats import SE5M2 as SE5M2
from optax_rms.storage._formats import SE8M7 as SE8M7
from optax_rms.storage._formats import UE6M2 as UE6M2
from optax_rms.storage._formats import UE8M8 as UE8M8
from optax_rms.storage._formats import Minifloat as Minifloat
from optax_rms.storage._master_weights import MasterWeightsState as MasterWeightsState
from optax_rms.storage._master_weights import master_weights as master_weights
from optax_rms.storage._master_weights import (
    split_master_weights as split_master_weights,
)
from optax_rms.storage._master_weights import split_weights as split_weights
from optax_rms.storage._seed_rounding import seed_rounding as seed_rounding
