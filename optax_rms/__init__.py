# SPDX-License-Identifier: Apache-2.0
"""RMSProp for JAX: exact, in every framework's dialect, and hard to break."""

from optax_rms import dialects, recipes
from optax_rms._adapt_state import adapt_state
from optax_rms._rmsprop import rmsprop
from optax_rms._scale_by_rms import ScaleByStddevState, scale_by_rms
from optax_rms.monitoring import (
    CodeCounts,
    Figures,
    MonitorState,
    StepReport,
    count_extremes,
    monitor,
    read_report,
    step_report,
)
from optax_rms.placement import one_pass, shard_state, state_shardings
from optax_rms.storage import (
    SE5M2,
    SE8M7,
    UE6M2,
    UE8M8,
    CompressState,
    MasterWeightsState,
    Minifloat,
    compress_state,
    decompress_state,
    master_weights,
    recompress_state,
    seed_rounding,
    split_master_weights,
    split_weights,
)

__all__ = [
    "SE5M2",
    "SE8M7",
    "UE6M2",
    "UE8M8",
    "CodeCounts",
    "CompressState",
    "Figures",
    "MasterWeightsState",
    "Minifloat",
    "MonitorState",
    "ScaleByStddevState",
    "StepReport",
    "adapt_state",
    "compress_state",
    "count_extremes",
    "decompress_state",
    "dialects",
    "master_weights",
    "monitor",
    "one_pass",
    "read_report",
    "recipes",
    "recompress_state",
    "rmsprop",
    "scale_by_rms",
    "seed_rounding",
    "shard_state",
    "split_master_weights",
    "split_weights",
    "state_shardings",
    "step_report",
]
