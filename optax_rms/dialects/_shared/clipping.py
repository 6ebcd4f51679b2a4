# SPDX-License-Identifier: Apache-2.0
"""Gradient clipping as TensorFlow and Keras have it, computed in at least float32."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_rms._numerics import widen, zero_at_zero
from optax_rms._types import PyTree


def clip_by_value(gradients: PyTree, limit: ArrayLike) -> PyTree:
    """Bring every element into [-limit, limit]."""

    def clip(g):
        g = jnp.asarray(g)
        bound = jnp.asarray(limit, g.dtype)
        return jnp.clip(g, -bound, bound)

    return jax.tree.map(clip, gradients)


def clip_by_norm(gradients: PyTree, limit: ArrayLike) -> PyTree:
    """Scale every array down until its Euclidean norm is at most ``limit``."""
    return jax.tree.map(lambda g: _scale(g, _factor(norm(g), limit)), gradients)


def clip_by_global_norm(gradients: PyTree, limit: ArrayLike) -> PyTree:
    """Scale all arrays down until their norm together is at most ``limit``.

    A norm that is not finite makes every gradient NaN, as in both frameworks: it is
    better to notice than to lose the direction.
    """
    total = norm(gradients)
    factor = jnp.where(jnp.isfinite(total), _factor(total, limit), jnp.nan)
    return jax.tree.map(lambda g: _scale(g, factor), gradients)


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of all arrays together, with a finite derivative at 0."""
    dtype = jnp.result_type(float)
    squares = [jnp.sum(jnp.square(jnp.abs(widen(g)))) for g in jax.tree.leaves(tree)]
    total = sum((s.astype(dtype) for s in squares), jnp.zeros((), dtype))
    return zero_at_zero(jnp.sqrt)(total)


def _factor(norm: jax.Array, limit: ArrayLike) -> jax.Array:
    limit = jnp.asarray(limit, norm.dtype)
    return limit / jnp.maximum(norm, limit)


def _scale(g: ArrayLike, factor: jax.Array) -> jax.Array:
    wide = widen(g)
    return (wide * factor.astype(wide.dtype)).astype(jnp.result_type(g))
