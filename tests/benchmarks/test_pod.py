# SPDX-License-Identifier: Apache-2.0
"""The step of a large model on a pod, on devices of the CPU in place of a pod."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks import peers, pod
from benchmarks.leaves import llama


def test_parameters_of_7b():
    """6.7 billion in table 2 of the paper, and all shapes divide by 16 by 16 chips."""
    assert sum(map(math.prod, llama())) == pytest.approx(6.7e9, rel=0.01)
    for shape in llama():
        parts = [16] * 2 if len(shape) == 2 else [256]
        assert all(n % k == 0 for n, k in zip(shape, parts, strict=True))


def test_a_step_on_four_devices():
    mesh = Mesh(np.reshape(jax.devices()[:4], (2, 2)), ("rows", "columns"))
    needs = pod.needs_of_step(peers.SPLIT, [(64, 32), (16,)], "bfloat16", mesh)
    elements = (64 * 32 + 16) // 4
    # Residual and code, of one byte each; scalars are on every device.
    scalars = needs["state"] - 2 * elements
    assert 0 < scalars < 32
    # Weights of two bytes with their state, twice, and gradients of two bytes.
    assert needs["floor"] == (2 * (2 + 2) + 2) * elements + 2 * scalars
    assert needs["resident"] == (2 + 2 + 2) * elements + scalars
    assert needs["collectives"] == 0
