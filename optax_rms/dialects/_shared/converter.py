# SPDX-License-Identifier: Apache-2.0
"""A user's function from tree to tree, proved to move elements and nothing else."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from optax_rms._leaf_names import dotted_name
from optax_rms._types import PyTree
from optax_rms.dialects._shared.problems import Problems
from optax_rms.dialects._shared.reading import (
    describe,
    real_numbers,
    to_framework,
    to_numpy,
    widen,
)


class Converter:
    """A user's function from tree to tree, proved to move elements and nothing else.

    The slots of an optimizer stand beside its parameters element by element. So a
    function that renames, transposes, reshapes, splits and joins parameters does the
    right thing to each slot as well, and one that scales, pads, drops, repeats or
    rounds them does not. To tell, the function is first given arrays whose elements are
    all the number of their array.

    Attributes:
      treedef: the structure of the function's result.
      sources: for each leaf of the result, the positions in the template, counted from
        0, of the arrays that its elements come from.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Any], PyTree],
        template: PyTree,
        *,
        name_hint: str = "",
    ):
        """Run the experiment.

        Args:
          name: the function's, as the user knows it: ``convert`` or ``convert_back``.
          function: the user's.
          template: a tree of arrays of at least float32, such as the function takes.
            The function is given arrays of the same shapes, dtypes and frameworks. Make
            it a ``collections.OrderedDict`` and not a ``dict``, whose keys are sorted.
            The function is given a ``dict`` in the order of the template.
          name_hint: the end of the message about a name that the template lacks: how to
            give other names.

        Raises:
          ValueError: the function fails, or elements are lost, repeated, altered or
            rounded; all arrays concerned are named.
        """
        self._name = name
        self._function = function
        self._template, self._treedef = jax.tree.flatten(template)
        self._name_hint = name_hint
        arrays = [to_numpy(leaf) for leaf in self._template]
        numbered = [_numbered(x, i) for i, x in enumerate(arrays, start=1)]
        result = self._apply("numbered arrays", self._treedef.unflatten(numbered))
        self.treedef = jax.tree.structure(result)
        self._kinds = [(x.shape, x.dtype) for x in jax.tree.leaves(result)]
        self.sources = self._trace(template, arrays, result)

    def __call__(self, slot: str, tree: PyTree) -> PyTree:
        """Move NumPy arrays in a tree like the template; ``slot`` is for messages."""
        result = self._apply(slot, tree)
        treedef = jax.tree.structure(result)
        kinds = [(x.shape, x.dtype) for x in jax.tree.leaves(result)]
        if treedef != self.treedef or kinds != self._kinds:
            raise ValueError(
                f"{self._name} must treat all slots alike, but for {slot} it returned "
                f"{treedef} with {kinds}, and before {self.treedef} with {self._kinds}"
            )
        return result

    def _apply(self, slot: str, tree: PyTree) -> PyTree:
        arrays = self._treedef.flatten_up_to(tree)
        leaves = map(to_framework, arrays, map(widen, self._template))
        try:
            given = self._treedef.unflatten(leaves)
            # A function that returns what it is given must not make the parameters an
            # OrderedDict, which JAX does not take for a dict.
            given = dict(given) if isinstance(given, OrderedDict) else given
            result = self._function(given)
            # Copied, as the function may use its memory again for the next slot.
            return jax.tree.map(lambda x: np.array(to_numpy(x)), result)
        except Exception as error:
            hint = ""
            if isinstance(error, KeyError) and isinstance(tree, Mapping):
                hint = f". The names are {_some(tree)}. {self._name_hint}".rstrip()
            raise ValueError(
                f"{self._name} raised {type(error).__name__} when given {slot}: {error}"
                f"{hint}"
            ) from error

    def _trace(self, template, arrays, result) -> list[tuple[int, ...]]:
        """Where the elements of the numbered arrays went."""
        problems = Problems(f"{self._name} must only move elements, each to one place")
        counts = np.zeros(len(arrays), np.int64)
        sources = []
        for path, leaf in jax.tree.leaves_with_path(result):
            description = f"{dotted_name(path)} ({describe(leaf)})"
            sources.append(())
            if leaf.dtype.kind not in "fc":
                problems.add(f"{description} is neither floating-point nor complex")
                continue
            if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
                problems.add(f"{description} cannot be held. {_X64_HINT}")
            numbers = _numbers(leaf)
            known = (numbers >= 1) & (numbers <= len(arrays))
            if not known.all():
                problems.add(
                    f"{description} has elements that were not given, or were altered "
                    "or rounded"
                )
            found = np.bincount(numbers[known] - 1, minlength=len(arrays))
            counts += found
            sources[-1] = tuple(map(int, np.flatnonzero(found)))
        for i, (path, _) in enumerate(jax.tree.leaves_with_path(template)):
            if counts[i] != (expected := real_numbers(arrays[i]).size):
                is_held = jax.dtypes.canonicalize_dtype(arrays[i].dtype)
                problems.add(
                    f"{dotted_name(path)} ({describe(arrays[i])}) has {expected} "
                    f"numbers, of which {counts[i]} came back."
                    f"{'' if is_held == arrays[i].dtype else ' ' + _X64_HINT}"
                    f"{_TIED_HINT if counts[i] > expected else ''}"
                )
        problems.raise_any()
        return sources


_TIED_HINT = (
    " Weights that two layers share, for example an embedding and an output layer, "
    "have one state: return one leaf for both, and use it twice in the model."
)
_X64_HINT = 'For 64 bits, call jax.config.update("jax_enable_x64", True) first.'


def _some(names: Iterable[Any]) -> str:
    """The names, of a large model only the first ten."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{names[:10]}{more}"


# By bytes per number. An odd number beyond them changes in the next narrower dtypes,
# which have 11 and 24 bits for its digits, and is exact in its own, with 24 and 53.
_OFFSETS = {4: 2.0**15, 8: 2.0**24}


def _numbered(array: Any, number: int) -> np.ndarray:
    """An array like this one, filled with its number, in both parts if complex."""
    value = _OFFSETS[array.real.dtype.itemsize] + 2 * number + 1
    return np.full_like(array, value * (1 + 1j) if np.iscomplexobj(array) else value)


def _numbers(array: np.ndarray) -> np.ndarray:
    """The numbers of the arrays that these elements come from, 0 if from none."""
    values = real_numbers(array).ravel().astype(np.float64)
    offsets = np.where(values > _OFFSETS[8], _OFFSETS[8], _OFFSETS[4])
    numbers = (values - offsets - 1) / 2
    is_whole = (numbers == np.floor(numbers)) & (abs(numbers) < _OFFSETS[8])
    return np.where(is_whole, numbers, 0).astype(np.int64)
