# SPDX-License-Identifier: Apache-2.0
"""The state of one configuration of an optimizer in that of another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_rms import _checks as checks
from optax_rms._leaf_names import dotted_name
from optax_rms._scale_by_rms import ScaleByRmsWithCountState, ScaleByStddevState
from optax_rms._types import PyTree
from optax_rms.storage import CompressState, MasterWeightsState

_PLAIN = (optax.ScaleByRmsState, ScaleByRmsWithCountState)
_MOVING_AVERAGES = (*_PLAIN, ScaleByStddevState)


def adapt_state(state: PyTree, like: PyTree, *, count: int | None = None) -> PyTree:
    r"""Convert the state of one configuration to another, wherever that is exact.

    A run goes on with other options, for example with a schedule in place of a number
    as learning rate, or from a checkpoint that returned lists and dicts. Both states
    may be parts of larger ones, such as those of ``optax.chain``, ``optax.MultiSteps``
    and ``optax.inject_hyperparams``.

    ==============================  ===================================================
    from, to                        conversion
    ==============================  ===================================================
    number, schedule                ``count`` is the number of steps so far
    schedule, number                the count is dropped
    no momentum, momentum           :math:`b = 0`
    momentum, no momentum           the momentum is dropped
    bias correction, none           the count is dropped, the averages are the same
    no bias correction, with        ``count``; not if ``centered``
    ``centered``, not               :math:`\nu = s + |\mu|^2`, rounded once; not with
                                    bias correction
    ``lr_in_momentum``, not         without momentum, or while it is 0
    averages in half precision      the same numbers in float32
    list, dict, look-alike class    the class that ``like`` has, matched by names and
                                    positions
    ==============================  ===================================================

    Every other pair is refused: a mean gradient that was never kept, an average in
    fewer bits, a momentum that contains other learning rates, codes of another storage
    format (`recompress_state`), other shapes.

    Args:
      state: what ``init`` or ``update`` of an optimizer returned, or what a checkpoint
        made of that, for example nested dicts with the names of fields and positions.
      like: the state that ``init`` of the other configuration returns; arrays or
        ``jax.ShapeDtypeStruct``. Only structure, shapes and dtypes are read.
      count: the number of steps so far, at least 0, for a state that has none.

    Returns:
      A state with the structure, shapes and dtypes of ``like``.

    Raises:
      ValueError: naming every part of the state that has no exact conversion.

    Example:
      A run with a constant learning rate goes on with a schedule, at step 2, where
      the schedule has fallen by half:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> gradients = jnp.array([2.0])
      >>> constant = optax_rms.rmsprop(0.1, decay=0.0)
      >>> state = constant.init(gradients)
      >>> for _ in range(2):
      ...     updates, state = constant.update(gradients, state)
      >>> print(updates)
      [-0.1]
      >>> schedule = optax.linear_schedule(0.1, 0.0, 4)
      >>> falling = optax_rms.rmsprop(schedule, decay=0.0)
      >>> state = optax_rms.adapt_state(state, falling.init(gradients), count=2)
      >>> updates, state = falling.update(gradients, state)
      >>> print(updates)
      [-0.05]
    """
    if count is not None and not isinstance(count, jax.Array):
        count = checks.check_steps("count", count, 0)
    problems: list[str] = []
    adapted = _adapt(_Place((), count, problems), state, like)
    if problems:
        lines = "".join(f"\n- {line}" for line in problems)
        raise ValueError(f"the state has no exact conversion:{lines}")
    return adapted


class _Place(NamedTuple):
    """Where in the state the conversion is.

    Attributes:
      path: from the root.
      count: the number of steps, or ``None`` if unknown.
      problems: collects complaints.
    """

    path: tuple[Any, ...]
    count: Any
    problems: list[str]

    def below(self, key: Any) -> "_Place":
        return self._replace(path=(*self.path, key))

    def refuse(self, reason: str) -> None:
        where = dotted_name(self.path) if self.path else "the state"
        self.problems.append(f"{where} {reason}")


def _adapt(place: _Place, state: Any, like: Any) -> Any:
    if _is_leaf(like):
        return _adapt_leaf(place, state, like)
    if _is_leaf(state):
        place.refuse(f"must be a {type(like).__name__}, got {_describe(state)}")
        return like
    for cls, hint in _WRAPPERS.items():
        has_fields = _named_like(state, like).keys() == set(cls._fields)
        if isinstance(like, cls) != has_fields:
            place.refuse(f"and like must both be a {cls.__name__}, or neither; {hint}")
            return like
    if _is_chain(like) and len(_children(state)) == len(like):
        state, place = _in_order(place, list(_children(state).values()), like)
    if isinstance(like, _MOVING_AVERAGES):
        state = _averages(place, _named_like(state, like), like)
    if isinstance(like, optax.ScaleByScheduleState) and not _children(state):
        state = {"count": _known_count(place)}
    if isinstance(like, optax.TraceState) and not _children(state):
        state = optax.TraceState(jax.tree.map(_zeros, like.trace))
    if isinstance(like, optax.EmptyState) and _children(state).keys() in (
        {"count"},
        {"trace"},
    ):
        state = like
    return _adapt_children(place, state, like)


_WRAPPERS = {
    CompressState: "see decompress_state and recompress_state",
    MasterWeightsState: "see master_weights for the weights; the rest is inner_state",
}


def _adapt_children(place: _Place, state: Any, like: Any) -> Any:
    """Convert each child of a node to its counterpart, by names or positions."""
    own, wanted = _named_like(state, like), _children(like)
    if isinstance(like, CompressState):
        formats, expected = ([*_children(x.get("fields"))] for x in (own, wanted))
        if formats != expected:
            place.refuse(
                f"has the formats {formats}, not {expected}; see recompress_state"
            )
            return like
    if missing := [name for name in wanted if name not in own]:
        place.refuse(f"lacks {', '.join(missing)}, and has {', '.join(own) or 'none'}")
    if left_over := [name for name in own if name not in wanted]:
        place.refuse(f"has {', '.join(left_over)}, for which like has no place")
    if missing or left_over:
        return like
    keys, treedef = _flatten_once(like)
    return treedef.unflatten(
        _adapt(place.below(key), own[name], child)
        for (key, child), name in zip(keys, wanted, strict=True)
    )


def _adapt_leaf(place: _Place, value: Any, like: Any) -> Any:
    if like is None:
        if value is not None and jax.tree.leaves(value):
            place.refuse("has no place in like, where it is None")
        return None
    if value is None or not _is_leaf(value):
        place.refuse(f"must be {_describe(like)}, got {_describe(value)}")
        return like
    dtype, own = jnp.result_type(like), jnp.result_type(value)
    if np.shape(value) != np.shape(like):
        place.refuse(f"must be {_describe(like)}, got {_describe(value)}")
    elif own != dtype and not _is_wider(dtype, own):
        place.refuse(f"is {own}, which {dtype} cannot hold exactly")
    elif own != dtype or not isinstance(value, jax.Array):
        return jnp.asarray(value, dtype)
    return value


def _is_chain(like: Any) -> bool:
    """Whether a state is that of `rmsprop`: averages, learning rate and momentum."""
    return (
        type(like) is tuple and len(like) == 3 and isinstance(like[0], _MOVING_AVERAGES)
    )


def _in_order(place: _Place, parts: list[Any], like: Any) -> tuple[Any, _Place]:
    """The parts of a chain in the order of ``like``, and where their count is known."""
    counts = [_children(part).get("count") for part in parts]
    known = next((count for count in counts if count is not None), place.count)
    place = place._replace(count=known)
    own, wanted = _rate_is_first(parts), _rate_is_first(like)
    if own is None or wanted is None or own == wanted:
        return tuple(parts), place
    first, *others = parts
    trace = next((_children(p)["trace"] for p in others if "trace" in _children(p)), ())
    has_trace = any(isinstance(part, optax.TraceState) for part in like)
    if has_trace and not all(map(_is_known_zero, jax.tree.leaves(trace))):
        inside, outside = ("inside", "outside") if own else ("outside", "inside")
        place.refuse(
            f"has a momentum with the learning rates {inside}, and like has them "
            f"{outside}: a sum over steps of different rates has no common factor. Set "
            "the momentum to 0, or keep lr_in_momentum"
        )
    return (first, *reversed(others)), place


def _rate_is_first(parts: Any) -> bool | None:
    """Whether the learning rate comes before the momentum; ``None`` if unknown."""
    _, second, third = (_children(part).keys() for part in parts)
    if "count" in second or "trace" in third:
        return True
    return False if "trace" in second or "count" in third else None


def _averages(place: _Place, own: dict[str, Any], like: Any) -> dict[str, Any]:
    """The fields that ``like`` has, computed from those that there are."""
    own = {name: value for name, value in own.items() if value is not None}
    counts = like._asdict().get("count") is not None
    if {"mu", "nu"} <= own.keys():
        place.refuse("is centered as in Optax; see dialects.optax.import_state")
        return like._asdict()
    has_mean = "variance" in own
    if isinstance(like, ScaleByStddevState) and not has_mean:
        place.refuse("has no mean gradient, which like needs for centered")
        return like._asdict()
    if has_mean and isinstance(like, _PLAIN) and "count" in own:
        place.refuse("has a bias-corrected mean, of which nu depends on the decay")
        return like._asdict()
    if has_mean and isinstance(like, ScaleByStddevState) and counts != ("count" in own):
        place.refuse(
            "is centered, and bias correction is only on one side: the mean gradient "
            "would have to be divided by 1 - decay^count"
        )
        return like._asdict()
    if has_mean and isinstance(like, _PLAIN):
        mu, variance = own.pop("mu"), own.pop("variance")
        own["nu"] = jax.tree.map(
            lambda m, s: s + jnp.square(jnp.abs(m)).astype(jnp.result_type(s)),
            mu,
            variance,
        )
    if counts and "count" not in own:
        own["count"] = _known_count(place)
    if not counts:
        own.pop("count", None)
    return {name: own.get(name) for name in like._fields}


def _known_count(place: _Place) -> Any:
    if place.count is None:
        place.refuse("has no number of steps; pass count")
        return jnp.zeros([], jnp.int32)
    return jnp.asarray(place.count, jnp.int32)


def _named_like(state: Any, like: Any) -> dict[str, Any]:
    """The children of a state, under the names that ``like`` has for positions."""
    own = _children(state)
    is_plain = isinstance(state, tuple | list) and not hasattr(state, "_fields")
    wanted = _children(like)
    if is_plain and len(own) == len(wanted):
        return dict(zip(wanted, own.values(), strict=True))
    return own


def _children(node: Any) -> dict[str, Any]:
    """The children of a node of a tree by name; positions are names as well."""
    if _is_leaf(node):
        return {}
    return {dotted_name((key,)): child for key, child in _flatten_once(node)[0]}


def _flatten_once(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    rows, treedef = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    return [(path[0], child) for path, child in rows], treedef


def _is_leaf(node: Any) -> bool:
    return node is None or jax.tree_util.all_leaves([node])


def _is_wider(dtype: Any, own: Any) -> bool:
    """Whether a dtype holds all numbers of another one of its kind."""
    same_kind = jnp.issubdtype(own, jnp.inexact) == jnp.issubdtype(dtype, jnp.inexact)
    with jax.numpy_dtype_promotion("standard"):
        return same_kind and jnp.promote_types(own, dtype) == dtype


def _is_known_zero(x: Any) -> bool:
    return not isinstance(x, Tracer) and not np.any(np.asarray(x))


def _zeros(x: Any) -> jax.Array:
    return jnp.zeros(np.shape(x), jnp.result_type(x))


def _describe(x: Any) -> str:
    if x is None or not hasattr(x, "dtype"):
        return type(x).__name__
    return f"{jnp.result_type(x)}{list(np.shape(x))}"
