# SPDX-License-Identifier: Apache-2.0
"""The code in docs/continue_from_tensorflow.md, apart from that for TensorFlow.

The files that the page reads are recorded ones, so that TensorFlow is not needed.
"""

import pathlib
import re
import shutil

import jax
import numpy as np
from helpers import tensorflow_files as files
from helpers import tensorflow_golden as golden
from helpers.frameworks import require

require("h5py")
PAGE = pathlib.Path(__file__).parents[3] / "docs" / "continue_from_tensorflow.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_the_code_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("checkpoint.npz", **files.checkpoint("new"))
    prefix = "checkpoint/graph/25/"
    saver = {
        key.removeprefix(prefix): value
        for key, value in golden.arrays().items()
        if key.startswith(prefix)
    }
    np.savez("saver.npz", **saver)
    shutil.copy(files.path("legacy_momentum", ".h5"), "model.h5")

    scope, states = {}, []
    code = [block for block in blocks("python") if "import tensorflow" not in block]
    assert len(code) == 4
    for block in code:
        exec(block, scope)
        states.append(scope["state"])
    assert capsys.readouterr().out == "".join(blocks("text"))

    new, first, legacy, exported = states
    velocity = files.checkpoint("new")[
        "optimizer/_variables/2/.ATTRIBUTES/VARIABLE_VALUE"
    ]
    np.testing.assert_array_equal(new.inner_state[0].nu["hidden"]["b"], velocity)
    np.testing.assert_array_equal(first[0].nu["w"], saver["dense/kernel/RMSProp"])
    np.testing.assert_array_equal(
        legacy[0].nu["out"]["w"], scope["exported"]["Slow/out/kernel/rms"]
    )
    assert jax.tree.structure(exported) == jax.tree.structure(legacy)
