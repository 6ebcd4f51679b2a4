# SPDX-License-Identifier: Apache-2.0
"""Random bits of its own for each member of an ensemble."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_rms.storage._compress_state import CompressState
from optax_rms.storage._master_weights import MasterWeightsState


def seed_rounding(state: Any, member: ArrayLike) -> Any:
    """A fresh state whose stochastic rounding depends on a member's number.

    Random bits are a hash of element, array and step, so the members of an ensemble
    under ``jax.vmap`` share them, and their rounding errors do not average out. With
    the number of the member in the hash, the errors of any two members are independent.
    The same number gives the same bits; a state without a number has bits of its own.

    Args:
      state: a state from ``init`` that contains a `CompressState` or a
        `MasterWeightsState`.
      member: an integer from 0 to 2^32 - 1, different for each member. Inside
        ``jax.vmap`` a scalar; outside, for the state of an ensemble, an array with one
        integer for each member, for example ``jnp.arange(64)``.

    Returns:
      A state like ``state`` with ``rounding_seed`` set. Numbers that ``init`` rounded,
      for example Adagrad's initial value, stay rounded alike in all members. Residuals
      of 16 bits are not rounded at random, and get no seed.

    Raises:
      ValueError: ``state`` contains no compressed or split state; ``member`` is out of
        range, or of another shape than ``rounding_step`` in the state.
      TypeError: ``member`` is not an integer.

    Example:
      Two members, the same gradients, and errors of opposite sign in some elements:

      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> params = gradients = jnp.ones((2, 1000))
      >>> tx = optax_rms.compress_state(optax.scale_by_rms(), nu=optax_rms.UE6M2)
      >>> def nu_after_a_step(state):
      ...     _, state = jax.vmap(tx.update)(gradients, state)
      ...     return state.inner_state.nu
      >>> state = jax.vmap(tx.init)(params)
      >>> first, second = nu_after_a_step(state)
      >>> print((first != second).sum())
      0
      >>> first, second = nu_after_a_step(optax_rms.seed_rounding(state, jnp.arange(2)))
      >>> bool((first != second).sum() > 100)
      True
    """
    found = False

    def seed(node: Any) -> Any:
        nonlocal found
        if not _is_rounded(node):
            return node
        found = True
        inner_state = jax.tree.map(seed, node.inner_state, is_leaf=_is_rounded)
        node = node._replace(inner_state=inner_state)
        if node.rounding_step is None:
            return node
        return node._replace(rounding_seed=_check_member(member, node.rounding_step))

    state = jax.tree.map(seed, state, is_leaf=_is_rounded)
    if not found:
        raise ValueError(
            "state must contain a CompressState or a MasterWeightsState, from "
            "compress_state or split_master_weights; there is none in this "
            f"{type(state).__name__}."
        )
    return state


def _is_rounded(node: Any) -> bool:
    return isinstance(node, CompressState | MasterWeightsState)


def _check_member(member: ArrayLike, step: jax.Array) -> jax.Array:
    """``member`` as uint32, or an error."""
    dtype = getattr(member, "dtype", type(member))
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"member must be an integer or an array of integers, got {member!r} of "
            f"type {type(member).__name__}."
        )
    if np.shape(member) != np.shape(step):
        raise ValueError(
            f"member must have the shape of rounding_step in the state, "
            f"{np.shape(step)}, got shape {np.shape(member)}. A state made by jax.vmap "
            "outside needs one integer for each member, for example jnp.arange(64)."
        )
    if not isinstance(member, jax.Array):
        low, high = np.min(member), np.max(member)
        if not 0 <= operator.index(low) <= operator.index(high) < 2**32:
            raise ValueError(f"member must be from 0 to 2^32 - 1, got {member!r}.")
        member = np.asarray(member, np.uint32)
    return jnp.asarray(member, jnp.uint32)
