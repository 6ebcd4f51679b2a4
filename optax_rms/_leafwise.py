# SPDX-License-Identifier: Apache-2.0
"""Elementwise steps, composed into one compiled function per leaf.

Every step of RMSProp treats every element of every parameter alike. So `chain` traces
its steps once per distinct shape and dtype instead of once per leaf, and keeps all of
the arithmetic between the gradient and the update in float32 or wider. A shape that
occurs once is traced as part of the step.
"""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from optax_rms import _checks as checks
from optax_rms._alike import full_like
from optax_rms._numerics import cast
from optax_rms._types import PyTree


def _no_numbers(count: Any) -> tuple[()]:
    del count
    return ()


class Step(NamedTuple):
    """One elementwise step of an optimizer.

    `chain` reads and replaces the fields of the state and counts the updates. The step
    itself says how one leaf changes.

    Attributes:
      state_class: the class of its state, a ``NamedTuple``.
      leaf: ``leaf(g, numbers, *fields) -> (g, *fields)``: the arithmetic on one leaf,
        in one precision. Compiled code is kept per function, so the function must not
        be made anew for every transformation.
      numbers: ``numbers(count)``, the numbers that all leaves share in this update.
        ``count`` is the number of updates before this one, ``None`` if not ``counts``.
      fields: for each field of the state that is a tree like the parameters, in the
        order in which ``leaf`` takes them, a function that makes the tree.
      counts: whether the state has a field ``count`` that is not ``None``.
    """

    state_class: type
    leaf: Callable[..., tuple[jax.Array, ...]]
    numbers: Callable[[Any], Any] = _no_numbers
    fields: Mapping[str, Callable[[PyTree], PyTree]] = {}
    counts: bool = False


def chain(*steps: Step) -> optax.GradientTransformationExtraArgs:
    """Chain steps; the state is the tuple of their states, as in ``optax.chain``.

    ``None`` in place of a gradient gives ``None`` and leaves that leaf's state alone.
    Leaves of an integer or boolean dtype have ``None`` as state.
    """
    state_classes = [step.state_class for step in steps]
    leaf_functions = tuple(step.leaf for step in steps)

    def init(params) -> Any:
        params = checks.check_parameters(params)
        return tuple(_init(step, params) for step in steps)

    def update(updates, state, params=None):
        del params
        checks.check_state_classes(state, state_classes)
        checks.check_inexact_leaves("gradients", updates)
        gradients, treedef = jax.tree.flatten(updates, is_leaf=lambda g: g is None)
        parts = list(zip(steps, state, strict=True))
        numbers = [step.numbers(s.count if step.counts else None) for step, s in parts]
        as_array = functools.partial(jnp.asarray, dtype=jnp.result_type(float))
        numbers = jax.tree.map(as_array, numbers)
        # For each step and each of its fields, the leaves in the order of gradients.
        columns = [
            {name: treedef.flatten_up_to(getattr(s, name)) for name in step.fields}
            for step, s in parts
        ]
        checks.check_state_shapes(
            updates, gradients, [column.values() for column in columns]
        )
        shapes = collections.Counter(jnp.shape(g) for g in gradients if g is not None)
        for i, g in enumerate(gradients):
            if g is None:
                continue
            leaves = [[leaf[i] for leaf in column.values()] for column in columns]
            # An update that is not traced needs a compiled function for each leaf. One
            # that only `jax.vmap` or `jax.grad` traces runs operation by operation.
            alone = shapes[jnp.shape(g)] == 1 and isinstance(g, Tracer)
            run = _run if alone else _run_once_traced
            gradients[i], leaves = run(leaf_functions, g, numbers, leaves)
            for column, new in zip(columns, leaves, strict=True):
                for name, leaf in zip(column, new, strict=True):
                    column[name][i] = leaf
        new_state = []
        for (step, s), column in zip(parts, columns, strict=True):
            new: dict[str, Any] = {k: treedef.unflatten(v) for k, v in column.items()}
            if step.counts:
                new["count"] = optax.safe_increment(s.count)
            new_state.append(s._replace(**new))
        return treedef.unflatten(gradients), tuple(new_state)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def single(step: Step) -> optax.GradientTransformation:
    """One step as a transformation whose state is the step's own, without a tuple."""
    chain_init: Any
    chain_update: Any
    chain_init, chain_update = chain(step)

    def init(params) -> Any:
        (state,) = chain_init(params)
        return state

    def update(updates, state, params=None):
        updates, (state,) = chain_update(updates, (state,), params)
        return updates, state

    return optax.GradientTransformation(init, update)


def _init(step: Step, params: PyTree) -> Any:
    state = {name: make(params) for name, make in step.fields.items()}
    if step.counts:
        state["count"] = jnp.zeros([], jnp.int32)
    elif "count" in getattr(step.state_class, "_fields", ()):
        state["count"] = None
    return step.state_class(**state)


def _run(leaf_functions, g, numbers, leaves):
    """Run all steps on one leaf; every array is returned in the dtype of its input."""
    wide = any(jnp.finfo(x.dtype).bits == 64 for x in [g, *jax.tree.leaves(leaves)])
    real, cplx = (jnp.float64, jnp.complex128) if wide else (jnp.float32, jnp.complex64)

    def widen(x):
        return cast(x, cplx if jnp.iscomplexobj(x) else real)

    numbers = jax.tree.map(lambda n: cast(n, real), numbers)
    dtype, g = g.dtype, widen(g)
    new_leaves = []
    for leaf_function, own, old in zip(leaf_functions, numbers, leaves, strict=True):
        g, *new = leaf_function(g, own, *map(widen, old))
        new_leaves.append([cast(n, o.dtype) for n, o in zip(new, old, strict=True)])
    return cast(g, dtype), new_leaves


_run_once_traced = jax.jit(_run, static_argnums=0)


def accumulator(
    params: PyTree,
    fill: ArrayLike = 0.0,
    dtype: DTypeLike | None = None,
    *,
    real: bool = False,
) -> PyTree:
    """A tree of arrays like ``params``, in ``dtype`` or at least float32.

    Complex parameters get a complex accumulator, or, if ``real``, a real one.
    """

    def like(p):
        own = jnp.result_type(p)
        width = dtype or (jnp.float64 if jnp.finfo(own).bits == 64 else jnp.float32)
        if jnp.issubdtype(own, jnp.complexfloating) and not real:
            # There are no complex numbers of half precision.
            width = jnp.complex128 if jnp.finfo(width).bits == 64 else jnp.complex64
        return full_like(p, fill, width)

    return jax.tree.map(like, params)
