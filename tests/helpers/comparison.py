# SPDX-License-Identifier: Apache-2.0
"""Comparisons of trees: by chex, and by hand the bits, which chex does not compare."""

import chex
import jax
import numpy as np
from helpers.trajectory import rounding_bound


def assert_same_bits(actual, expected):
    """Equal structures, shapes, dtypes and bits: -0 is not 0, and NaN is that NaN."""
    actual, expected = jax.tree.map(np.asarray, (actual, expected))
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal_comparator(
        lambda a, e: a.tobytes() == e.tobytes(),
        lambda a, e: f"bits of {a} and {e}",
        actual,
        expected,
    )


def assert_close(actual, expected, steps, loss=1.0):
    """Equal but for rounding in float32, or `loss` times as much, at values near 1.

    XLA fuses two programs for the same steps in different ways, and rounds other
    products and sums once instead of twice.
    """
    bound = loss * rounding_bound(np.float32, steps)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=bound, atol=bound)
