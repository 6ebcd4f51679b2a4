# SPDX-License-Identifier: Apache-2.0
"""Elementwise steps, composed into one compiled function per leaf.

Every step of RMSProp treats every element of every parameter alike. So `chain` traces
its steps once per distinct shape and dtype instead of once per leaf, and keeps all of
the arithmetic between the gradient and the update in float32 or wider.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_rms._checks import (
    check_inexact_leaves,
    check_state_classes,
    check_state_shapes,
)
from optax_rms._types import PyTree


class Step(NamedTuple):
    """One elementwise step of an optimizer.

    Attributes:
      state_class: the class of its state.
      init: ``init(params) -> state``.
      begin: ``begin(state) -> (scalars, trees)``: the numbers that all leaves share,
        and a tuple of the trees in the state, shaped like the parameters, that change.
      leaf: ``leaf(g, scalars, *leaves) -> (g, *leaves)``: the arithmetic on one leaf,
        in one precision. Compiled code is kept per function, so it must not be made
        anew for every transformation.
      end: ``end(state, *trees) -> state``: the next state, from the changed trees.
    """

    state_class: type
    init: Callable[[PyTree], Any]
    begin: Callable[[Any], tuple[Any, tuple[PyTree, ...]]]
    leaf: Callable[..., tuple[jax.Array, ...]]
    end: Callable[..., Any]


def chain(*steps: Step) -> optax.GradientTransformationExtraArgs:
    """Chain steps; the state is the tuple of their states, as in ``optax.chain``.

    ``None`` in place of a gradient gives ``None`` and leaves that leaf's state alone.
    """
    state_classes = [step.state_class for step in steps]
    leaf_functions = tuple(step.leaf for step in steps)

    def init(params) -> Any:
        check_inexact_leaves("parameters", params)
        return tuple(step.init(params) for step in steps)

    def update(updates, state, params=None):
        del params
        check_state_classes(state, state_classes)
        scalars, trees = zip(
            *(step.begin(s) for step, s in zip(steps, state, strict=True)), strict=True
        )
        as_array = functools.partial(jnp.asarray, dtype=jnp.result_type(float))
        scalars = jax.tree.map(as_array, scalars)
        check_inexact_leaves("gradients", updates)
        gradients, treedef = jax.tree.flatten(updates, is_leaf=lambda g: g is None)
        columns = [[treedef.flatten_up_to(tree) for tree in ts] for ts in trees]
        check_state_shapes(updates, gradients, columns)
        for i, g in enumerate(gradients):
            if g is None:
                continue
            leaves = [[column[i] for column in cs] for cs in columns]
            gradients[i], leaves = _run(leaf_functions, g, scalars, leaves)
            for cs, new in zip(columns, leaves, strict=True):
                for column, leaf in zip(cs, new, strict=True):
                    column[i] = leaf
        state = tuple(
            step.end(s, *map(treedef.unflatten, cs))
            for step, s, cs in zip(steps, state, columns, strict=True)
        )
        return treedef.unflatten(gradients), state

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


@functools.partial(jax.jit, static_argnums=0)
def _run(leaf_functions, g, scalars, leaves):
    """Run all steps on one leaf; every array leaves in the dtype in which it came."""
    wide = any(jnp.finfo(x.dtype).bits == 64 for x in [g, *jax.tree.leaves(leaves)])
    real, cplx = (jnp.float64, jnp.complex128) if wide else (jnp.float32, jnp.complex64)

    def widen(x):
        return x.astype(cplx if jnp.iscomplexobj(x) else real)

    scalars = jax.tree.map(lambda s: s.astype(real), scalars)
    dtype, g = g.dtype, widen(g)
    new_leaves = []
    for leaf_function, numbers, old in zip(
        leaf_functions, scalars, leaves, strict=True
    ):
        g, *new = leaf_function(g, numbers, *map(widen, old))
        new_leaves.append([n.astype(o.dtype) for n, o in zip(new, old, strict=True)])
    return g.astype(dtype), new_leaves


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
        return jnp.full_like(p, fill, dtype=width)

    return jax.tree.map(like, params)
