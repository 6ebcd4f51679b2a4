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

    Each element of a parameter has one element in every slot of the optimizer. So a
    function that renames, transposes, reshapes, splits and joins parameters is right
    for the slots as well. A function that scales, pads, drops, repeats or rounds
    elements is not. To find out, the function is first given arrays whose elements all
    say which array they belong to (see `_numbered`).

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
        """Find the arrays that the elements of each leaf of the result come from."""
        problems = Problems(f"{self._name} must only move elements, each to one place")
        # One row per leaf of the result: how many elements come from each array.
        counts = [
            _count_sources(problems, path, leaf, len(arrays))
            for path, leaf in jax.tree.leaves_with_path(result)
        ]
        returned = sum(counts, start=np.zeros(len(arrays), int))
        paths = [path for path, _ in jax.tree.leaves_with_path(template)]
        for path, array, count in zip(paths, arrays, returned, strict=True):
            _check_returned(problems, path, array, int(count))
        problems.raise_any()
        return [tuple(map(int, np.flatnonzero(row))) for row in counts]


def _count_sources(
    problems: Problems, path: Any, leaf: np.ndarray, arrays: int
) -> np.ndarray:
    """How many elements of a leaf of the result come from each of the arrays."""
    description = f"{dotted_name(path)} ({describe(leaf)})"
    if leaf.dtype.kind not in "fc":
        problems.add(f"{description} is neither floating-point nor complex")
        return np.zeros(arrays, int)
    if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        problems.add(f"{description} cannot be held. {_X64_HINT}")
    numbers = _numbers(leaf)
    is_known = (numbers >= 1) & (numbers <= arrays)
    if not is_known.all():
        problems.add(
            f"{description} has elements that were not given, or were altered or "
            "rounded"
        )
    return np.bincount(numbers[is_known] - 1, minlength=arrays)


def _check_returned(problems: Problems, path: Any, array: Any, count: int) -> None:
    """All elements of an array must be in the result, each of them once."""
    if count == (expected := real_numbers(array).size):
        return
    is_held = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    problems.add(
        f"{dotted_name(path)} ({describe(array)}) has {expected} numbers, of which "
        f"{count} came back."
        f"{'' if is_held else ' ' + _X64_HINT}"
        f"{_TIED_HINT if count > expected else ''}"
    )


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


# Elements of the k-th array are offset + 2 k + 1, with the offset of their dtype, by
# bytes per number. Such a number is odd and has 16 binary digits at least in float32
# (25 in float64), so that every digit down to the last matters. A dtype that is
# narrower than its own has fewer digits (float16 11, bfloat16 8, float32 24) and rounds
# the number to an even one, which belongs to no array. That is how a cast shows.
_OFFSETS = {4: 2.0**15, 8: 2.0**24}


def _numbered(array: Any, number: int) -> np.ndarray:
    """An array like this one, whose elements all say that they are of this number.

    Of a complex array, real and imaginary part both say so.

    Example:
      >>> weights = _numbered(np.zeros(2, np.float32), 1)
      >>> print(weights, _numbers(weights))
      [32771. 32771.] [1 1]

      Numbers that were rounded on their way, here to a multiple of 32, are of none:

      >>> rounded = weights.astype(np.float16).astype(np.float32)
      >>> print(rounded, _numbers(rounded))
      [32768. 32768.] [0 0]
    """
    value = _OFFSETS[array.real.dtype.itemsize] + 2 * number + 1
    return np.full_like(array, value * (1 + 1j) if np.iscomplexobj(array) else value)


def _numbers(array: np.ndarray) -> np.ndarray:
    """The inverse of `_numbered`, element by element; 0 for any other number."""
    values = real_numbers(array).ravel().astype(np.float64)
    # float32 numbers may have gone into a float64 array, where they are exact.
    offsets = np.where(values > _OFFSETS[8], _OFFSETS[8], _OFFSETS[4])
    numbers = (values - offsets - 1) / 2
    is_whole = (numbers == np.floor(numbers)) & (abs(numbers) < _OFFSETS[8])
    return np.where(is_whole, numbers, 0).astype(np.int64)
