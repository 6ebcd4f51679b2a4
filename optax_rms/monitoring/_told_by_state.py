# SPDX-License-Identifier: Apache-2.0
"""What the state of any Optax optimizer tells about each parameter."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_leaves_with_path

from optax_rms._scale_by_rms import (
    ScaleByRmsWithCountState,
    ScaleByStddevState,
    sum_of_weights,
)
from optax_rms._types import Number
from optax_rms.monitoring._count_extremes import is_saturated
from optax_rms.storage._compress_state import (
    CompressState,
    compressed_leaves,
    decompress_state,
)

Path = tuple[Any, ...]


def _state_class(tx: optax.GradientTransformation) -> Any:
    return type(jax.eval_shape(tx.init, ()))


# By class and not by the name ``nu``: ``optax.scale_by_sm3`` has a momentum of that
# name. Only ``optax.adamax``, which keeps a maximum in the state of Adam, is mistaken.
_FIELDS = {
    optax.ScaleByRmsState: ("nu",),
    ScaleByRmsWithCountState: ("nu",),
    optax.ScaleByAdamState: ("nu",),
    _state_class(optax.scale_by_stddev()): ("nu", "mu"),
    _state_class(optax.scale_by_stddev(bias_correction=True)): ("nu", "mu"),
    ScaleByStddevState: ("variance", "mu"),
}


class Moments(NamedTuple):
    """The moving averages of one leaf.

    Attributes:
      fields: the arrays by the name of their field: ``nu``, the mean square; ``nu`` and
        ``mu``, the mean gradient; or ``variance`` and ``mu``.
      total: the sum of the weights, by which the averages are divided; ``None`` for 1.
    """

    fields: dict[str, jax.Array]
    total: jax.Array | None


def moments_by_path(state: Any, decay: Number | None) -> dict[Path, Moments]:
    """The moving averages of each leaf, by its path; float32 where there are codes.

    A leaf with two mean squares has none here, since it is not told which of them is
    meant. The same holds for a corrected bias, of which ``decay`` is not known.
    """
    if _is_any_compressed(state):
        state = decompress_state(state)
    found: dict[Path, list[Moments]] = {}
    for node in jax.tree.leaves(state, is_leaf=_has_moments):
        if not _has_moments(node):
            continue
        total = None
        if "count" in node._fields and node.count is not None:
            if decay is None:
                continue
            total = sum_of_weights(decay, node.count)
        columns = {
            name: tree_leaves_with_path(getattr(node, name))
            for name in _FIELDS[type(node)]
        }
        for rows in zip(*columns.values(), strict=True):
            fields = dict(zip(columns, (leaf for _, leaf in rows), strict=True))
            found.setdefault(rows[0][0], []).append(Moments(fields, total))
    return {path: several[0] for path, several in found.items() if len(several) == 1}


def saturated_by_path(state: Any, paths: list[Path]) -> dict[Path, list[jax.Array]]:
    """Which codes of each leaf are at the end of their format, one array per field."""
    found: dict[Path, list[jax.Array]] = {path: [] for path in paths}
    if _is_any_compressed(state):
        for path, _, format, values in compressed_leaves(state):
            owner = _owner(path, found)
            if owner is not None:
                found[owner].append(is_saturated(format, values))
    return found


def bytes_by_path(state: Any, paths: list[Path]) -> dict[Path, int]:
    """The bytes of the arrays in ``state`` whose path ends as that of the leaf."""
    found = dict.fromkeys(paths, 0)
    for path, array in tree_leaves_with_path(state):
        owner = _owner(path, found)
        if owner is not None:
            found[owner] += num_bytes(array)
    return found


def num_bytes(array: Any) -> int:
    return array.size * jnp.dtype(array.dtype).itemsize


def _owner(path: Path, paths: Collection[Path]) -> Path | None:
    """The longest end of ``path`` that is one of ``paths``."""
    ends = (path[i:] for i in range(len(path) + 1))
    return next((end for end in ends if end in paths), None)


def _is_any_compressed(state: Any) -> bool:
    return any(map(_is_compressed, jax.tree.leaves(state, is_leaf=_is_compressed)))


def _is_compressed(node: Any) -> bool:
    return isinstance(node, CompressState)


def _has_moments(node: Any) -> bool:
    return type(node) in _FIELDS
