# SPDX-License-Identifier: Apache-2.0
"""Transformations run on streams of gradients."""

import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec


class History(NamedTuple):
    """Updates, parameters and states of every step, with a leading axis of steps."""

    updates: Any
    params: Any
    state: Any

    @property
    def last(self) -> tuple[Any, Any]:
        """The parameters and the state at the end."""
        return at(self.params, -1), at(self.state, -1)

    @property
    def path(self) -> Any:
        """The sums of all updates so far, in float64, where their rounding is small."""

        def total(updates):
            wide = np.complex128 if np.iscomplexobj(updates) else np.float64
            return np.cumsum(updates, axis=0, dtype=wide)

        return jax.tree.map(total, self.updates)


def step(tx, params, state, gradients):
    """The step that every user writes."""
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def run(
    tx,
    gradients,
    params=None,
    state=None,
    how: Literal["eager", "jit", "scan"] = "eager",
) -> History:
    """Run a transformation on a stream of gradients.

    Args:
      tx: the transformation.
      gradients: a tree of arrays of shape ``[steps, ...]``.
      params: the parameters to start from, zeros by default.
      state: the state to start from, ``tx.init(params)`` by default.
      how: ``"eager"``, a loop in Python, operation by operation; ``"jit"``, a loop in
        Python over a compiled step, traced once; ``"scan"``, one compiled program,
        which a caller may itself transform.
    """
    if params is None:
        params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), gradients)
    params = jax.tree.map(jnp.asarray, params)
    carry = _on_one_mesh((params, tx.init(params) if state is None else state))

    def advance(carry, gradients):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), History(updates, params, state)

    if how == "scan":
        scan = jax.jit(functools.partial(jax.lax.scan, advance))
        return scan(carry, jax.tree.map(jnp.asarray, gradients))[1]
    if how == "jit":
        chex.clear_trace_counter()  # It counts all functions defined at this place.
        advance = jax.jit(chex.assert_max_traces(advance, n=1))
    gradients, history = jax.tree.map(np.asarray, gradients), []
    for t in range(len(jax.tree.leaves(gradients)[0])):
        carry, after = advance(carry, jax.tree.map(jnp.asarray, at(gradients, t)))
        history.append(after)
    return jax.tree.map(lambda *steps: np.stack(steps), *history)


def _on_one_mesh(carry):
    """With whatever lies on no mesh beside what does, as in a user's program.

    Otherwise the first step would put it there, and the second be compiled anew.
    """

    def is_on_mesh(x):
        is_concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        return is_concrete and isinstance(x.sharding, NamedSharding)

    meshes = {x.sharding.mesh for x in jax.tree.leaves(carry) if is_on_mesh(x)}
    if not meshes:
        return carry
    replicated = NamedSharding(*meshes, PartitionSpec())
    return jax.tree.map(
        lambda x: x if is_on_mesh(x) else jax.device_put(x, replicated), carry
    )


def at(stack, t):
    """One step, or a slice of steps, of a tree of arrays of shape ``[steps, ...]``."""
    return jax.tree.map(lambda x: x[t], stack)
