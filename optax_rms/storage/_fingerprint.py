# SPDX-License-Identifier: Apache-2.0
"""A number beside stored arrays that says in which format they were stored.

A serialiser of leaves, for example ``equinox.tree_deserialise_leaves``, can put the
arrays of one format into a state of another. The fingerprint comes from the same file,
and then differs from the format that the structure of the state names.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def fingerprint(formats: str) -> jax.Array:
    """A uint32 scalar, the CRC-32 of a description of the formats."""
    return jnp.asarray(_crc32(formats))


def check_fingerprint(
    transformation: str, stored: Any, formats: str, conversion: str
) -> bool | jax.Array:
    """Whether arrays were stored in ``formats``; raise if that is known to be wrong.

    Args:
      transformation: name for the message.
      stored: fingerprint in the state, of any shape, since ``jax.vmap`` adds axes.
      formats: description of the formats in which the arrays will be read.
      conversion: functions that convert to other formats, for the message.

    Returns:
      ``True``, or, if ``stored`` is traced or lies on several hosts, a bool scalar
      with which `reject` makes the values NaN.

    Raises:
      ValueError: ``stored`` is the fingerprint of other formats.
    """
    # flax.nnx.Optimizer keeps each array in a variable, which is a node of the tree.
    leaves = jax.tree.leaves(stored)
    if leaves and not _has_value(leaves[0]):
        return jnp.all(leaves[0] == _crc32(formats))
    if not leaves or not np.all(np.asarray(leaves[0]) == _crc32(formats)):
        raise ValueError(
            f"{transformation} reads this state in the formats {formats}, but its "
            "arrays were stored in other formats. Either the state is of another "
            "transformation, or a serialiser that looks at leaves only has filled it "
            "from a file of other formats, for example eqx.tree_deserialise_leaves, or "
            "Orbax with partial_restore=True. Load the file into a state with the "
            f"formats of the run that wrote it, then convert with {conversion}."
        )
    return True


def reject(values: jax.Array, unless: bool | jax.Array) -> jax.Array:
    """NaN in place of values that were stored in other formats."""
    return jnp.where(unless, values, jnp.asarray(jnp.nan, values.dtype))


def _crc32(formats: str) -> np.uint32:
    return np.uint32(zlib.crc32(formats.encode()))


def _has_value(array: Any) -> bool:
    if isinstance(array, Tracer):
        return False
    return not isinstance(array, jax.Array) or (
        array.is_fully_addressable or array.is_fully_replicated
    )
