# SPDX-License-Identifier: Apache-2.0
"""Argument checks and their error messages."""

import itertools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optax_rms._leaf_names import leaf_name
from optax_rms._types import Number


def check_number(
    name: str,
    value: ArrayLike,
    low: float = 0.0,
    high: float = math.inf,
    *,
    exclude_low: bool = False,
    exclude_high: bool = False,
    hint: str = "",
) -> Number:
    """Return ``value`` as a Python float or a scalar array, or say what is wrong.

    Python and NumPy numbers must be finite and lie between ``low`` and ``high``. JAX
    arrays are checked for their shape only: under ``jax.vmap`` and
    ``optax.inject_hyperparams`` they have no value yet. But what is at most 1, the
    weight of the past in an average, is not taken in half precision.
    """
    if np.ndim(value) > 0:
        raise ValueError(
            f"{name} must be a number or a scalar array, got one of shape "
            f"{np.shape(value)}; to train with many values at once, use jax.vmap."
        )
    if isinstance(value, jax.Array):
        is_half = jnp.issubdtype(value.dtype, jnp.floating) and value.itemsize < 4
        if is_half and high == 1:
            raise TypeError(
                f"{name} must have at least 32 bits, got {value.dtype}, in which 0.999 "
                "may be 1. optax.inject_hyperparams casts numbers to the dtype of the "
                "parameters, unless it is given hyperparam_dtype=jnp.float32."
            )
        return value
    if isinstance(value, np.ndarray):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a number or a scalar array, got {value!r} "
            f"of type {type(value).__name__}."
        )
    number = float(value)
    above = number > low if exclude_low else number >= low
    below = number < high if exclude_high else number <= high
    if not (math.isfinite(number) and above and below):
        left = "(" if exclude_low else "["
        right = ")" if exclude_high or high == math.inf else "]"
        raise ValueError(
            f"{name} must be a finite number in {left}{low:g}, {high:g}{right}, "
            f"got {value!r}.{hint and ' ' + hint}"
        )
    return number


def check_steps(name: str, value: Any, low: int = 1, *, optional: bool = False) -> Any:
    """Return a number of steps that decides the structure of the program, or ``None``.

    Only if it is ``optional`` may it be ``None``.
    """
    if optional and value is None:
        return None
    either = "None or " if optional else ""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name} must be {either}an int of at least {low}, got {value!r} of type "
            f"{type(value).__name__}. It cannot be traced: under "
            "optax.inject_hyperparams, name it in static_args."
        )
    number = int(value)
    if not low <= number < 2**31:
        raise ValueError(
            f"{name} must be {either}at least {low} and below 2^31, got {value}."
        )
    return number


def check_flag(name: str, value: object) -> bool:
    """Return ``value`` as a Python bool: flags decide the structure of the program."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(
        f"{name} must be True or False, got {value!r} of type {type(value).__name__}; "
        "it is fixed when the transformation is built and cannot be traced."
    )


def reject_options(**options: tuple[Any, Any, str]) -> None:
    """Raise a ``ValueError`` for an option that is not at its default.

    Each is a tuple of the value, the default, and what to do instead.
    """
    for name, (value, default, hint) in options.items():
        if value is not default:
            raise ValueError(f"{name} must be {default} here, got {value!r}. {hint}")


def check_accumulator_dtype(name: str, value: DTypeLike | None) -> np.dtype | None:
    """Return ``value`` as a real floating dtype that this process can hold."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a floating dtype or None, got {value!r}."
        ) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must be a real floating dtype such as jnp.float32, got {dtype}."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{name}={dtype} needs 64-bit mode; call "
            'jax.config.update("jax_enable_x64", True) first.'
        )
    return dtype


def check_inexact_leaves(what: str, tree: Any) -> None:
    """Raise a ``TypeError`` naming every leaf that is neither real nor complex."""
    if all(map(_is_inexact, jax.tree.leaves(tree))):
        return
    bad = [
        f"{leaf_name(path)} ({_dtype_name(leaf)})"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not _is_inexact(leaf)
    ]
    raise TypeError(
        f"{what} must be floating-point or complex; these leaves are not: "
        f"{', '.join(bad)}. Cast them, or leave them out with optax.masked."
    )


def check_state_shapes(
    updates: Any, gradients: list[Any], columns: list[list[list[Any]]]
) -> None:
    """Raise a ``ValueError`` naming every gradient whose shape its state does not have.

    ``gradients`` are the leaves of ``updates``, with ``None``; each column holds the
    leaves of one tree of the state in the same order, each list of columns one step's.
    """
    flat = list(itertools.chain.from_iterable(columns))
    bad = [
        i
        for i, g in enumerate(gradients)
        if g is not None
        and any(np.shape(g) != getattr(column[i], "shape", None) for column in flat)
    ]
    if not bad:
        return
    paths = jax.tree_util.tree_leaves_with_path(updates, is_leaf=lambda g: g is None)
    lines = [
        f"{leaf_name(paths[i][0])} has shape {np.shape(gradients[i])}, its state "
        f"{[getattr(column[i], 'shape', column[i]) for column in flat]}"
        for i in bad
    ]
    raise ValueError(
        "gradients must have the shapes of the parameters given to init; "
        f"{'; '.join(lines)}."
    )


def check_state_class(transformation: str, state: Any, expected: Any) -> None:
    """Raise a ``TypeError`` if ``state`` is not of the class that ``init`` returns."""
    if not isinstance(state, expected):
        raise TypeError(
            f"{transformation} needs the {expected.__name__} that its init returns, "
            f"got {type(state).__name__}."
        )


def check_state_classes(states: Any, expected: list[type]) -> None:
    """Raise a ``TypeError`` if ``states`` are not of the classes that ``init`` returns.

    One that only looks alike would be updated in part, or not at all.
    """
    is_chain = isinstance(states, tuple | list) and not hasattr(states, "_fields")
    got = list(map(type, states)) if is_chain else type(states)
    if got != expected:
        raise TypeError(
            f"update needs the state that init returns, {_names(expected)}, got "
            f"{_names(got)}. The state of another transformation, or of this one with "
            "other options, has to be converted first; see optax_rms.dialects."
        )


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)


def _dtype_name(leaf: Any) -> str:
    try:
        return str(jnp.result_type(leaf))
    except TypeError:
        return type(leaf).__name__


def _names(classes: Any) -> str:
    if isinstance(classes, list):
        return f"({', '.join(c.__name__ for c in classes)})"
    return classes.__name__
