# SPDX-License-Identifier: Apache-2.0
"""Moments and weights of any Optax optimizer in fewer bytes."""

from optax_rms.storage._compress_state import (
    CompressState,
    compress_state,
    decompress_state,
    recompress_state,
)
from optax_rms.storage._formats import SE5M2, SE8M7, UE6M2, UE8M8, Minifloat
from optax_rms.storage._master_weights import (
    MasterWeightsState,
    master_weights,
    split_master_weights,
    split_weights,
)
from optax_rms.storage._seed_rounding import seed_rounding

__all__ = [
    "SE5M2",
    "SE8M7",
    "UE6M2",
    "UE8M8",
    "CompressState",
    "MasterWeightsState",
    "Minifloat",
    "compress_state",
    "decompress_state",
    "master_weights",
    "recompress_state",
    "seed_rounding",
    "split_master_weights",
    "split_weights",
]
