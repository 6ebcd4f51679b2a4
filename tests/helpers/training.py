# SPDX-License-Identifier: Apache-2.0
"""A few steps of training, with which every check of the contract compares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import comparison
from helpers.running import run

STEPS = 4


def _tree(rng, *leading):
    # Two elements for each of eight devices: XLA's CPU code rounds one alone otherwise.
    return {
        "kernel": rng.uniform(1, 2, (*leading, 8, 2)).astype(np.float32),
        "bias": rng.uniform(1, 2, (*leading, 16)).astype(np.float32),
    }


_rng = np.random.default_rng(0)
PARAMS = jax.tree.map(jnp.asarray, _tree(_rng))
GRADIENTS = jax.tree.map(lambda x: jnp.asarray(x - 1.5), _tree(_rng, STEPS))


@functools.cache
def plain(row):
    """The plain loop of a row with its own numbers."""
    return run(row(), GRADIENTS, PARAMS)


assert_close = functools.partial(comparison.assert_close, steps=STEPS)
