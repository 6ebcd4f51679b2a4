# SPDX-License-Identifier: Apache-2.0
"""Argument checks and their error messages."""

import itertools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from optax_rms._leaf_names import leaf_name
from optax_rms._numerics import is_half
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
    """Return ``value`` as a Python float or a scalar array, or raise an error.

    Python and NumPy numbers must be finite and lie between ``low`` and ``high``. JAX
    arrays are checked for their shape and dtype only: under ``jax.vmap`` and
    ``optax.inject_hyperparams`` they have no value yet. Numbers with an upper bound of
    1, for example ``decay``, are rejected in half precision, because 0.999 may round to
    1 there, and every number is rejected in float16, because 1e-8 rounds to 0.
    """
    if np.ndim(value) > 0:
        raise ValueError(
            f"{name} must be a number or a scalar array, got one of shape "
            f"{np.shape(value)}; to train with many values at once, use jax.vmap."
        )
    if isinstance(value, jax.Array):
        reason = None
        if is_half(value) and high == 1:
            reason = "0.999 may be 1"
        elif value.dtype == jnp.float16:
            reason = "1e-8 is 0"
        if reason:
            raise TypeError(
                f"{name} must have at least 32 bits, got {value.dtype}, in which "
                f"{reason}. optax.inject_hyperparams casts numbers to the dtype of the "
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


def is_zero(number: Number) -> bool:
    """Whether a checked number is known to be 0 when the transformation is built.

    A momentum or decay of 0 needs no buffer and no parameters. The value of a JAX array
    is not known: under ``jax.vmap`` it may be 0 for some members only.
    """
    return isinstance(number, float) and number == 0


def check_steps(name: str, value: Any, low: int = 1, *, optional: bool = False) -> Any:
    """Return a number of steps that decides the structure of the program, or ``None``.

    ``None`` is allowed only if ``optional``.
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


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of the strings ``choices``."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def reject_options(**options: tuple[Any, Any, str]) -> None:
    """Raise a ``ValueError`` for an option that is not at its default.

    Each option is a tuple of the value, the default, and a hint at the alternative.
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


def check_parameters(params: Any) -> Any:
    """Return ``params`` with ``None`` for leaves that cannot be trained.

    An integer or boolean leaf has no gradient and therefore no state, for example the
    step counter in ``eqx.filter(model, eqx.is_array)``. Raise a ``TypeError`` naming
    every leaf that is neither an array nor a number.
    """
    if bad := _named_leaves(params, lambda leaf: _dtype(leaf) is None):
        raise TypeError(
            f"parameters must be arrays or numbers; these leaves are not: {bad}. "
            "Leave them out, for example with eqx.filter(model, eqx.is_array)."
        )
    return jax.tree.map(lambda leaf: leaf if _is_inexact(leaf) else None, params)


def check_inexact_leaves(what: str, tree: Any) -> None:
    """Raise a ``TypeError`` naming every leaf that is neither real nor complex."""
    if bad := _named_leaves(tree, lambda leaf: not _is_inexact(leaf)):
        raise TypeError(
            f"{what} must be floating-point or complex, or None where nothing is "
            f"trained; these leaves are not: {bad}. With Equinox, take gradients of "
            "eqx.filter(model, eqx.is_inexact_array); with Flax, build nnx.Optimizer "
            "with wrt=nnx.Param; elsewhere cast them, or leave them out with "
            "optax.masked."
        )


def check_state_shapes(
    updates: Any, gradients: list[Any], columns: Iterable[Iterable[list[Any]]]
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
        "gradients must have the shapes of the parameters given to init, where a "
        "parameter without state (None) was an integer or was not there; "
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

    A look-alike, for example a list that a checkpoint returned, would be updated in
    part, or would change its structure within ``jax.lax.scan``.
    """
    is_chain = isinstance(states, tuple | list) and not hasattr(states, "_fields")
    classes = list(map(type, states)) if is_chain else None
    if type(states) is not tuple or classes != expected:
        got = _names(classes) if is_chain else type(states).__name__
        got = f"a list, {got}" if isinstance(states, list) else got
        raise TypeError(
            f"update needs the state that init returns, {_names(expected)}, got {got}. "
            "The state of another transformation, or of this one with other options, "
            "has to be converted first: from other options, or from the lists and "
            "dicts of a checkpoint, with optax_rms.adapt_state(state, "
            "tx.init(params)), from another framework with optax_rms.dialects."
        )


def _named_leaves(tree: Any, is_bad: Callable[[Any], bool]) -> str:
    """Names and dtypes of the leaves that are bad, separated by commas."""
    return ", ".join(
        f"{leaf_name(path)} ({_dtype(leaf) or type(leaf).__name__})"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if is_bad(leaf)
    )


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)


def _dtype(leaf: Any) -> Any:
    """The dtype of an array or a number, or ``None``."""
    try:
        return jnp.result_type(leaf)
    except TypeError:  # For example the float0 of a derivative of an integer.
        return getattr(leaf, "dtype", None)


def _names(classes: Any) -> str:
    return f"({', '.join(c.__name__ for c in classes)})"
