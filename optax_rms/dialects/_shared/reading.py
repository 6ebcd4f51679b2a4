# SPDX-License-Identifier: Apache-2.0
"""Arrays and numbers of any framework, read and checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_rms import _checks as checks


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
      ValueError: the slot is no array, has another shape or dtype, is neither
        floating-point nor complex, or holds numbers that are not finite, or, with
        ``nonnegative``, negative.
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
    numbers = real_numbers(array)
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


def describe(array: Any) -> str:
    """Dtype and shape, as in float32[3, 4]."""
    return f"{array.dtype}{list(array.shape)}"


def real_numbers(array: Any) -> np.ndarray:
    """All numbers in an array; a complex number is two."""
    return np.stack([array.real, array.imag]) if np.iscomplexobj(array) else array


def _brief(value: Any) -> str:
    return f"{str(value)[:50]!r} of type {type(value).__name__}"
