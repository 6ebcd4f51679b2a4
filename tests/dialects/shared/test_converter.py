# SPDX-License-Identifier: Apache-2.0
"""The user function that every hand-over calls."""

import numpy as np

from optax_rms.dialects._shared.converter import Converter


def test_a_function_may_use_its_memory_again():
    memory = np.zeros((3, 2), np.float32)

    def transpose(tree):
        memory[...] = tree["weight"].T
        return {"kernel": memory}

    shape = (2, 3)
    converter = Converter("convert", transpose, {"weight": np.ones(shape, np.float32)})
    first = converter("first", {"weight": np.full(shape, 1.0)})
    converter("second", {"weight": np.full(shape, 2.0)})
    np.testing.assert_array_equal(first["kernel"], 1.0)
