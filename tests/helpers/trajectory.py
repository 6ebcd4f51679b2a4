# SPDX-License-Identifier: Apache-2.0
"""Gradients for comparisons, and the bound of the rounding in them."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np


def rounding_bound(dtype, steps):
    """The bound of the rounding in `History.path`, relative to the length of the path.

    A moving average of positive numbers, and a momentum buffer, round three times per
    step; ten more roundings lie between the gradient and the update.
    """
    return (2 * 3 * steps + 10) * float(jnp.finfo(dtype).eps)


@contextlib.contextmanager
def x64():
    """64-bit mode, as every version of JAX spells it."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def alternating_stream(steps, eps=1e-8, seed=0):
    """Gradients of shape (steps, 6), float32, whose variance is most of E[g^2].

    Hence E[g^2] - E[g]^2 does not cancel, and centered optimizers that subtract can be
    compared. The first gradient is 0: the variance of one sample would be all rounding.
    Columns: scale 1, 1e-2, 1e2, and around sqrt(eps), where its place shows.
    """
    rng = np.random.default_rng(seed)
    g = rng.uniform(0.5, 1.5, size=(steps, 6)) * (-1.0) ** np.arange(steps)[:, None]
    root = np.sqrt(eps)
    g = g * [1.0, 1e-2, 1e2, root / 10, root, root * 10]
    g[0] = 0.0
    return g.astype(np.float32)


def three_dtypes(g):
    """The stream `g` as a tree with a leaf in each of three dtypes."""
    return {
        "float32": g,
        "float64": g.astype(np.float64),
        "complex64": (g + 1j * g[:, ::-1]).astype(np.complex64),
    }
