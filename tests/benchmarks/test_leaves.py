# SPDX-License-Identifier: Apache-2.0
"""The lists of shapes, against the numbers of parameters that are published."""

import math

import pytest

from benchmarks import leaves

COUNTS = {  # elements and leaves
    "one leaf of 16M": (2**24, 1),
    # torchvision's `resnet50` and `GPT2LMHeadModel` of transformers count the same.
    "ResNet-50": (25_557_032, 161),
    "GPT-2 124M": (124_439_808, 148),
    "1,000 leaves of 8k": (8_192_000, 1000),
    "one leaf of 1M": (2**20, 1),
    "20 leaves of 8k": (163_840, 20),
}
LEAF_SETS = leaves.LEAF_SETS | leaves.QUICK_LEAF_SETS


@pytest.mark.parametrize("name", LEAF_SETS)
def test_leaf_sets_have_the_published_sizes(name):
    shapes = LEAF_SETS[name]
    assert (sum(map(math.prod, shapes)), len(shapes)) == COUNTS[name]
