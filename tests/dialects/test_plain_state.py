# SPDX-License-Identifier: Apache-2.0
"""Exporters name the conversion of a state in fewer bytes."""

import jax.numpy as jnp
import pytest

from optax_rms import UE6M2, compress_state, dialects, split_master_weights

EXPORTERS = {
    "torch": lambda state: dialects.torch.export_state(state, dict, like={}),
    "keras": lambda state: dialects.keras.export_state(state, dict, like=[]),
    "tensorflow": lambda state: dialects.tensorflow.export_state(state, dict, {}),
    "optax": dialects.optax.export_state,
}


@pytest.mark.parametrize("framework", EXPORTERS)
def test_states_in_fewer_bytes_are_refused_with_the_conversion(framework):
    inner = getattr(dialects, framework).rmsprop(0.1)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    compressed = compress_state(inner, nu=UE6M2).init(params)
    with pytest.raises(TypeError, match=rf"{framework}.export_state .*decompress_st"):
        EXPORTERS[framework](compressed)
    with pytest.raises(TypeError, match=r"decompress_state"):
        EXPORTERS[framework]((compressed,))
    split = split_master_weights(inner).init(params)
    with pytest.raises(TypeError, match=r"inner_state, and master_weights\(params"):
        EXPORTERS[framework](split)
