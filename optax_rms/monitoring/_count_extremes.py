# SPDX-License-Identifier: Apache-2.0
"""How many codes of a compressed state are at the ends of their format."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_rms.storage._compress_state import compressed_leaves
from optax_rms.storage._formats import Minifloat


class CodeCounts(NamedTuple):
    """How many codes of a field are at an end of their format.

    Attributes:
      elements: number of codes.
      saturated: number of codes of plus or minus the largest value.
      zeros: number of codes of 0.
    """

    elements: int
    saturated: jax.Array
    zeros: jax.Array


def count_extremes(state: Any) -> dict[str, CodeCounts]:
    """Count, for each compressed field, the codes at the ends of its format.

    A saturated code hides how large the value was, and a second moment that is too
    small makes steps too long. One overflow in a gradient saturates codes for a while;
    if codes stay saturated, move the window up, for example with
    ``dataclasses.replace(UE6M2, lowest_exponent=-40)``. Zeros are in order where no
    gradient ever came, and where values are small against ``eps``. If there are many
    other zeros, which a run without compression shows, move the window down. If the
    window would have to move both ways, use a format of two bytes.

    Args:
      state: a `CompressState`, or any state that contains some.

    Returns:
      The counts of each field, over all of its arrays.

    Raises:
      ValueError: ``state`` contains no `CompressState`, or the codes were stored in
        other formats than ``fields`` says. Compiled, the second case counts every code
        of the field both as saturated and as zero.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> tx = optax_rms.compress_state(optax.scale_by_rms(), nu=optax_rms.UE6M2)
      >>> gradients = jnp.array([1e6, 1.0, 0.0])
      >>> _, state = tx.update(gradients, tx.init(gradients))
      >>> counts = optax_rms.count_extremes(state)["nu"]
      >>> print(counts.elements, counts.saturated, counts.zeros)
      3 1 1
    """
    counts: dict[str, CodeCounts] = {}
    for _, field, format, values in compressed_leaves(state):
        unreadable = jnp.isnan(values)
        new = CodeCounts(
            elements=values.size,
            saturated=jnp.sum(is_saturated(format, values), dtype=jnp.uint32),
            zeros=jnp.sum((values == 0) | unreadable, dtype=jnp.uint32),
        )
        old = counts.get(field)
        counts[field] = jax.tree.map(operator.add, old, new) if old else new
    return counts


def is_saturated(format: Minifloat, values: jax.Array) -> jax.Array:
    """Which decoded values are at the ends of their format, or were never in it.

    No code is NaN: these were stored in other formats, which a compiled program cannot
    report but by counts that nobody can take for real.
    """
    return (jnp.abs(values) == format.largest) | jnp.isnan(values)
