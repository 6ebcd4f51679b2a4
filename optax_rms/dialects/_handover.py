# SPDX-License-Identifier: Apache-2.0
"""Handing over a run: what the importers and exporters of all frameworks share.

An importer works in three stages, and each of them reports everything that it finds
wrong in one ``ValueError``, so that nothing is ever half loaded:

1. It reads. `Problems` collects what `read_array`, `read_number` and `read_count`, or
   any of the checks of arguments, complain about.
2. It converts. The user's ``convert`` moves arrays from ``{name: array}`` to the tree
   of the parameters. `Converter` finds out by an experiment where the elements go,
   refuses a function that loses or alters any, and then converts one slot of the
   optimizer after the other. It knows which parameters a leaf comes from.
3. It assembles. `fields` and `with_fields` read and replace the fields of a state by
   name, whatever the order of the steps in the chain.

An exporter does the same with the user's ``convert_back``. `variance` and `mean_square`
translate between centred RMSProp here and everywhere else, in both directions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_rms import _checks as checks

PyTree = Any


class Problems:
    """Collects complaints, to raise them all in one ``ValueError``."""

    def __init__(self, summary: str):
        """``summary`` opens the message: "the state dict cannot be imported"."""
        self._summary = summary
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)

    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function returns, or ``None`` if it complains."""
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            self.add(str(error))
            return None

    def raise_any(self) -> None:
        if self._lines:
            lines = "".join(f"\n- {line}" for line in self._lines)
            raise ValueError(f"{self._summary}:{lines}")


def read_array(
    name: str, value: Any, like: Any = None, *, nonnegative: bool = False
) -> np.ndarray:
    """A slot as a NumPy array of at least float32.

    Args:
      name: for messages.
      value: the slot, an array of any framework.
      like: an array of the shape and, apart from widening, the dtype that the slot must
        have; ``None`` if they are unknown.
      nonnegative: whether the slot holds squares.

    Raises:
      ValueError: it is no array, has another shape or dtype, is neither floating-point
        nor complex, or holds numbers that are not finite or not allowed to be negative.
    """
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise ValueError(f"{name} must be an array, got {_brief(value)}")
    try:
        array = to_numpy(value)
    except Exception as error:  # Every framework has its own exceptions.
        raise ValueError(f"{name} cannot be read: {error}") from error
    if array.dtype.kind not in "fc":
        raise ValueError(f"{name} must be floating-point or complex, got {array.dtype}")
    if like is not None and describe(to_numpy(like)) != describe(array):
        raise ValueError(
            f"{name} must be {describe(to_numpy(like))}, got {describe(array)}"
        )
    numbers = _real_numbers(array)
    if bad := np.count_nonzero(~np.isfinite(numbers)):
        raise ValueError(f"{name} must be finite, got {bad} numbers that are not")
    if nonnegative and (bad := np.count_nonzero(numbers < 0)):
        raise ValueError(f"{name} must not be negative, got {bad} numbers that are")
    return array


def read_number(
    name: str, value: Any, low: float = 0.0, high: float = np.inf, **bounds: Any
) -> float:
    """A number, or an array of one element, as a finite Python float in [low, high].

    ``bounds`` are those of `optax_rms._checks.check_number`.
    """
    if hasattr(value, "shape"):
        array = to_numpy(value)
        if array.size != 1:
            raise ValueError(f"{name} must be a number, got shape {array.shape}")
        value = array.item()
    return float(checks.check_number(name, value, low, high, **bounds))


def read_count(name: str, value: Any) -> int:
    """A number of steps, stored as an integer, a float, or an array of one element."""
    number = read_number(name, value, 0, np.iinfo(np.int32).max)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, got {number!r}")
    return int(number)


def to_numpy(value: Any) -> np.ndarray:
    """An array of any framework in NumPy; low-precision floats become float32."""
    if hasattr(value, "detach"):
        value = widen(value.detach().cpu())
    array = np.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4:
        array = array.astype(np.float32)
    return array


def widen(value: Any) -> Any:
    """A low-precision PyTorch tensor, which NumPy might not know, in float32."""
    if hasattr(value, "new_tensor") and value.is_floating_point():
        return value.float() if value.element_size() < 4 else value
    return value


def to_framework(values: np.ndarray, template: Any) -> Any:
    """A copy as an array of the template's framework, on its device.

    Of PyTorch's it has the dtype as well.
    """
    if hasattr(template, "new_tensor"):
        # It cannot read all of NumPy's dtypes either.
        return template.new_tensor(to_numpy(values))
    if isinstance(template, jax.Array):
        return jnp.array(values)
    return np.array(values)


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

    def __init__(self, name: str, function: Callable[[Any], PyTree], template: PyTree):
        """Run the experiment.

        Args:
          name: the function's, as the user knows it: ``convert`` or ``convert_back``.
          function: the user's.
          template: a tree of arrays of at least float32, such as the function takes.
            The function is given arrays of the same shapes, dtypes and frameworks. Make
            it a ``collections.OrderedDict`` and not a ``dict``, whose keys are sorted.

        Raises:
          ValueError: the function fails, or elements are lost, repeated, altered or
            rounded; all arrays concerned are named.
        """
        self._name = name
        self._function = function
        self._template, self._treedef = jax.tree.flatten(template)
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
            result = self._function(self._treedef.unflatten(leaves))
            # Copied, as the function may use its memory again for the next slot.
            return jax.tree.map(lambda x: np.array(to_numpy(x)), result)
        except Exception as error:
            raise ValueError(
                f"{self._name} raised {type(error).__name__} when given {slot}: {error}"
            ) from error

    def _trace(self, template, arrays, result) -> list[tuple[int, ...]]:
        """Where the elements of the numbered arrays went."""
        problems = Problems(f"{self._name} must only move elements, each to one place")
        counts = np.zeros(len(arrays), np.int64)
        sources = []
        for path, leaf in jax.tree.leaves_with_path(result):
            description = f"{leaf_name(path)} ({describe(leaf)})"
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
            if counts[i] != (expected := _real_numbers(arrays[i]).size):
                is_held = jax.dtypes.canonicalize_dtype(arrays[i].dtype)
                problems.add(
                    f"{leaf_name(path)} ({describe(arrays[i])}) has {expected} numbers,"
                    f" of which {counts[i]} came back."
                    f"{'' if is_held == arrays[i].dtype else ' ' + _X64_HINT}"
                )
        problems.raise_any()
        return sources


_X64_HINT = 'For 64 bits, call jax.config.update("jax_enable_x64", True) first.'

# By bytes per number. An odd number beyond them changes in the next narrower dtypes,
# which have 11 and 24 bits for its digits, and is exact in its own, with 24 and 53.
_OFFSETS = {4: 2.0**15, 8: 2.0**24}


def _numbered(array: Any, number: int) -> np.ndarray:
    """An array like this one, filled with its number, in both parts if complex."""
    value = _OFFSETS[array.real.dtype.itemsize] + 2 * number + 1
    return np.full_like(array, value * (1 + 1j) if np.iscomplexobj(array) else value)


def _numbers(array: np.ndarray) -> np.ndarray:
    """The numbers of the arrays that these elements come from, 0 if from none."""
    values = _real_numbers(array).ravel().astype(np.float64)
    offsets = np.where(values > _OFFSETS[8], _OFFSETS[8], _OFFSETS[4])
    numbers = (values - offsets - 1) / 2
    is_whole = (numbers == np.floor(numbers)) & (abs(numbers) < _OFFSETS[8])
    return np.where(is_whole, numbers, 0).astype(np.int64)


def is_less_than_square(
    mean_square: np.ndarray, mean: np.ndarray, dtype: Any = np.float32
) -> bool:
    """Whether a mean square is less than the squared mean by more than by rounding.

    A square that underflows in the ``dtype`` of the framework is lost in every step,
    and missing from an average 1 / (1 - decay) times: up to 10^4, for decays in use.
    """
    lost = 1e4 * float(jnp.finfo(dtype).tiny)
    wide = np.abs(mean).astype(np.float64)
    return bool(np.any(mean_square + lost < 0.5 * np.square(wide)))


def variance(mean_square: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The variance that belongs to a mean square and a mean: 0 where it is negative.

    Rounding leaves some frameworks a mean square that is less than the squared mean.
    The real and imaginary parts of complex arrays are apart.
    """
    if np.iscomplexobj(mean_square):
        return _by_parts(variance, mean_square, mean)
    wide = mean_square.astype(np.float64) - np.square(mean.astype(np.float64))
    dtype = np.promote_types(mean_square.dtype, np.float32)
    return np.maximum(wide, 0).astype(dtype)


def mean_square(variance_: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The inverse of `variance`, in the dtype of ``mean``.

    Of a mean square much larger than the variance only the leading digits of the latter
    remain, in every framework that stores it. But a variance that came from such a mean
    square comes from the result as well, bit for bit: the original lies within half a
    step of the sum, so that it is the rounded sum or one of its two neighbours.
    """
    if np.iscomplexobj(variance_):
        return _by_parts(mean_square, variance_, mean)
    wide = variance_.astype(np.float64) + np.square(mean.astype(np.float64))
    with np.errstate(over="ignore"):
        nearest = wide.astype(mean.dtype)
    below, above = (
        np.nextafter(nearest, np.asarray(limit, mean.dtype)) for limit in (0, np.inf)
    )
    exact = [variance(x, mean) == variance_ for x in (nearest, below, above)]
    return np.select(exact, [nearest, below, above], nearest)


def fields(state: Any) -> dict[str, Any]:
    """The fields in the state of a chain by name, without those that are ``None``."""
    return {
        name: value
        for part in state
        for name, value in part._asdict().items()
        if value is not None
    }


def with_fields(state: Any, new: dict[str, Any]) -> Any:
    """The state of a chain with these in place of the fields that are not ``None``."""
    return tuple(
        part._replace(**{k: new[k] for k in fields([part]).keys() & new.keys()})
        for part in state
    )


def describe(array: Any) -> str:
    """Dtype and shape, as in float32[3, 4]."""
    return f"{array.dtype}{list(array.shape)}"


def leaf_name(path: Any) -> str:
    """A readable name of a leaf: keys and indices with dots between them."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "the only leaf"


def _by_parts(function, *arrays):
    result: Any = np.empty_like(arrays[0])
    result.real = function(*(x.real for x in arrays))
    result.imag = function(*(x.imag for x in arrays))
    return result


def _real_numbers(array: Any) -> np.ndarray:
    """All numbers in an array; a complex number is two."""
    return np.stack([array.real, array.imag]) if np.iscomplexobj(array) else array


def _brief(value: Any) -> str:
    return f"{str(value)[:50]!r} of type {type(value).__name__}"
