# SPDX-License-Identifier: Apache-2.0
"""Arrays that are sharded like another array, also under `jax.jit`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from optax_rms._types import PyTree


def full_like(x: Any, fill: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """``jnp.full_like``, sharded like ``x`` also where ``x`` is traced.

    A constant depends on no argument of a compiled function, so XLA would put the
    constant on one device (https://github.com/jax-ml/jax/issues/16679).
    """
    return like(x, jnp.full_like(x, fill, dtype=dtype))


def like(x: Any, array: jax.Array) -> jax.Array:
    """``array``, sharded like ``x`` of the same shape where ``x`` is traced."""
    if not isinstance(x, Tracer):
        return array
    # A choice between an array and itself. XLA shards the operands of an elementwise
    # operation alike, and drops this one later. For integers XLA drops x == x too soon.
    # (JAX 0.12 removed `jax.experimental.shard_alike`.)
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    return jnp.where(x == x, array, array)


def state_like(params: PyTree, state: PyTree) -> PyTree:
    """``state`` with every tree in it that is like ``params`` sharded as they are.

    For states of other libraries, whose ``init`` makes constants.
    """
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        return state
    treedef = jax.tree.structure(params)

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def is_like_params(node: Any) -> bool:
        return jax.tree.structure(node, is_leaf=is_masked) == treedef

    def leaf_like(p: Any, leaf: Any) -> Any:
        return like(p, leaf) if jnp.shape(p) == getattr(leaf, "shape", None) else leaf

    return jax.tree.map(
        lambda n: jax.tree.map(leaf_like, params, n) if is_like_params(n) else n,
        state,
        is_leaf=is_like_params,
    )
