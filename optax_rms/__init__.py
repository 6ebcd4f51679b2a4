# SPDX-License-Identifier: Apache-2.0
"""RMSProp for JAX: exact, in every framework's dialect, and hard to break."""

from optax_rms import dialects as dialects
from optax_rms import recipes as recipes
from optax_rms._adapt_state import adapt_state as adapt_state
from optax_rms._rmsprop import rmsprop as rmsprop
from optax_rms._scale_by_rms import ScaleByStddevState as ScaleByStddevState
from optax_rms._scale_by_rms import scale_by_rms as scale_by_rms
from optax_rms.monitoring import CodeCounts as CodeCounts
from optax_rms.monitoring import count_extremes as count_extremes
from optax_rms.placement import state_shardings as state_shardings
from optax_rms.storage import SE5M2 as SE5M2
from optax_rms.storage import SE8M7 as SE8M7
from optax_rms.storage import UE6M2 as UE6M2
from optax_rms.storage import UE8M8 as UE8M8
from optax_rms.storage import CompressState as CompressState
from optax_rms.storage import MasterWeightsState as MasterWeightsState
from optax_rms.storage import Minifloat as Minifloat
from optax_rms.storage import compress_state as compress_state
from optax_rms.storage import decompress_state as decompress_state
from optax_rms.storage import master_weights as master_weights
from optax_rms.storage import recompress_state as recompress_state
from optax_rms.storage import seed_rounding as seed_rounding
from optax_rms.storage import split_master_weights as split_master_weights
from optax_rms.storage import split_weights as split_weights
