# SPDX-License-Identifier: Apache-2.0
"""States in fewer bytes, which no framework knows, are refused with the conversion."""

from typing import Any

import jax

from optax_rms.storage import CompressState, MasterWeightsState

_CONVERSIONS = {
    CompressState: "decompress_state(state), which is float32",
    MasterWeightsState: (
        "state.inner_state, and master_weights(params, state) as the weights"
    ),
}


def check_plain_state(function: str, state: Any) -> None:
    """Raise a ``TypeError`` if there are codes or residuals anywhere in ``state``."""
    is_packed = tuple(_CONVERSIONS)
    for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, is_packed)):
        if isinstance(node, is_packed):
            raise TypeError(
                f"{function} needs a state without compression, got one with "
                f"{type(node).__name__}; export {_CONVERSIONS[type(node)]}."
            )
