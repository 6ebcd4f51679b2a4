# SPDX-License-Identifier: Apache-2.0
"""A few steps of training, and the plain Python loop that all checks compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers.trajectory import rounding_bound

STEPS = 4


def _tree(rng):
    # Two elements for each of eight devices: XLA's CPU code rounds one alone otherwise.
    return {
        "kernel": rng.uniform(1, 2, (8, 2)).astype(np.float32),
        "bias": rng.uniform(1, 2, 16).astype(np.float32),
    }


_rng = np.random.default_rng(0)
PARAMS = jax.tree.map(jnp.asarray, _tree(_rng))
GRADIENTS = [
    jax.tree.map(lambda x: jnp.asarray(x - 1.5), _tree(_rng)) for _ in range(STEPS)
]


def step(tx, params, state, gradients):
    """The step that every user writes."""
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def loop(tx, params=PARAMS, gradients=GRADIENTS, state=None, *, jit=False):
    """The parameters and the state after every step; with `jit`, compiled once."""
    calls = []

    def run(params, state, g):
        calls.append(g)
        return step(tx, params, state, g)

    if jit:
        run = jax.jit(run)
    state = tx.init(params) if state is None else state
    history = []
    for g in gradients:
        params, state = run(params, state, g)
        history.append((params, state))
    assert len(calls) == (1 if jit else len(gradients))
    return history


@functools.cache
def plain(row):
    """The plain loop of a row at its own numbers."""
    return loop(row())


@functools.cache
def jitted(row):
    """The same, compiled."""
    return loop(row(), jit=True)


def at(history, t):
    """One step of a stacked history, or one case of a stack of cases."""
    return jax.tree.map(lambda x: x[t], history)


def stack(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def assert_close(actual, expected, loss=1.0):
    """Equal but for the rounding of float32, or `loss` times that, at values near 1.

    The programs compared differ in what XLA fuses, and so in which products and sums it
    rounds once instead of twice.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    bound = loss * rounding_bound(np.float32, STEPS)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=bound, atol=bound)


def assert_same_bits(actual, expected):
    """Equal structures, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)
