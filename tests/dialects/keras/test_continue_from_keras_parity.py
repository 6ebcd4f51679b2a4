# SPDX-License-Identifier: Apache-2.0
"""The page "Continue a run from Keras": its code runs, and the run continues."""

import pathlib
import re

import jax
import numpy as np
import pytest
from helpers.frameworks import require
from helpers.keras_runs import BOUND, keras

require("h5py")

pytestmark = [
    pytest.mark.parity,
    # Raised within Keras by np.array of its variables.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "continue_from_keras.md"


def test_page(tmp_path, monkeypatch):
    """One more epoch is the same in Keras and in JAX, there and back."""
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    saved, *blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    scope = {}
    with jax.numpy_dtype_promotion("standard"):  # as it is for a reader
        exec(compile(saved, "<page>", "exec"), scope)
        model = scope["model"]
        start = [np.array(v) for v in model.trainable_variables]
        for block in blocks:
            exec(compile(block, "<page>", "exec"), scope)
        ours = [np.array(v) for v in model.trainable_variables]
        slots = [np.array(v) for v in model.optimizer.variables]
        model = keras.saving.load_model("model.keras")
        epoch = {"batch_size": 16, "epochs": 1, "shuffle": False, "verbose": 0}
        model.fit(scope["inputs"], scope["targets"], **epoch)
    expected = [np.array(v) for v in model.trainable_variables]
    for a, b, s in zip(ours, expected, start, strict=True):
        path = np.max(np.abs(b - s))
        assert path > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=BOUND * path)
    assert slots[0] == 16
    for a, b in zip(slots, model.optimizer.variables, strict=True):
        # Of each slot, relative to its largest number.
        b = np.array(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=BOUND * np.max(np.abs(b)))
