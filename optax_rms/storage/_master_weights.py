# SPDX-License-Identifier: Apache-2.0
"""The wrapper for bfloat16 parameters: weights that train as if they were float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_rms import _checks as checks
from optax_rms._alike import full_like, state_like
from optax_rms._leaf_names import leaf_name
from optax_rms._types import PyTree
from optax_rms.storage._fingerprint import check_fingerprint, fingerprint, reject
from optax_rms.storage._residuals import advance, join, split
from optax_rms.storage._rounding import WEIGHT_STREAM, leaf_numbers

_RESIDUAL_DTYPES = {8: jnp.int8, 16: jnp.int16}
_CONVERSION = "master_weights and split_weights"


class MasterWeightsState(NamedTuple):
    """State of `split_master_weights`.

    Attributes:
      rounding_step: number of updates so far, modulo 2^32, uint32 scalar. The random
        bits of stochastic rounding are a function of it. ``None`` with residuals of 16
        bits.
      residual: master weight minus weight, int8 or int16 of the weight's shape, in
        units of 2^-8 or 2^-16 of the spacing of the weight's dtype;
        ``optax.MaskedNode`` for a leaf that is not split.
      inner_state: state of the wrapped transformation, made for float32 weights.
      formats: fingerprint of the number of bits and the dtypes of the weights, uint32
        scalar. A serialiser stores it beside the residuals, so that residuals of other
        weights are recognized. ``None`` in states of version 0.1, which had none.
      rounding_seed: the number that `seed_rounding` set, uint32 scalar, or ``None``.
    """

    rounding_step: jax.Array | None
    residual: PyTree
    inner_state: Any
    formats: jax.Array | None = None
    rounding_seed: jax.Array | None = None


def split_master_weights(
    inner: optax.GradientTransformation, residual_bits: int = 8
) -> optax.GradientTransformationExtraArgs:
    r"""Train bfloat16 weights as if they were float32: keep the rounding residual.

    A bfloat16 weight has 8 significant bits. A step shorter than 2^-9 of the weight
    rounds away, and training stalls. Here the model has bfloat16 (or float16) weights,
    and the optimizer state has the rounding residual of each weight. With weight
    :math:`\theta`, residual :math:`r` and gradient :math:`g`,

    .. math::
      w_t &= (\theta_{t-1} + r_{t-1}) + \text{inner}(g_t, \; \theta_{t-1} + r_{t-1}) \\
      \theta_t &= \text{round}(w_t), \qquad r_t = w_t - \theta_t, \qquad r_0 = 0

    in float32, rounding to the nearest (ties away from zero).
    ``optax.apply_updates(params, updates)`` arrives at :math:`\theta_t`, bit for bit.
    ``inner`` receives gradients and weights in float32 and keeps a float32 state:
    small steps and weight decay act on the master weights :math:`w = \theta + r`.

    ========  =============  ===========================  =========  ===============
    weight    residual_bits  master weight                bytes,     worst relative
                                                          in all     error of a step
    ========  =============  ===========================  =========  ===============
    bfloat16  16             float32                      4          2^-24
    bfloat16  8              16 significant bits          3          2^-15
    float16   16             float32, from 2^-17 to 2^16  4          2^-24
    float16   8              19 significant bits          3          2^-18
    ========  =============  ===========================  =========  ===============

    Bytes are those of weight and residual for each parameter. The error is relative to
    the master weight; that of 16 bits is the rounding of float32 itself.

    * Residuals of 8 bits: each master weight is rounded stochastically, to one of its
      two neighbours with the probability that makes the mean exact. Steps of any length
      count on average, and a step of 0 changes nothing.
    * float16 below 2^-14 has the spacing of 2^-14. Master weights there are multiples
      of 2^-32, and with 16 bits below 2^-17 multiples of 2^-40.
    * Updates have the dtype of the gradients. In the weight's own dtype, some steps
      that flip the sign of a weight, halve it or double it have no exact number. Only
      these steps are off, by up to 2^-7 of their length (float16: 2^-10). The gradient
      itself came rounded by up to 2^-8 (2^-11).
    * Gradients cast to float32 give a float32 update without this loss, for example
      ``tx.update(optax.tree.cast(gradients, jnp.float32), state, params)``. With 16
      bits and bfloat16 the master weights are then those of a float32 run, bit for bit,
      unless a step cancels all but 2^-14 of a weight, where the error is up to 2^-24 of
      the step. ``optax.apply_updates`` adds float32 to bfloat16 only under JAX's
      standard dtype promotion.
    * Leaves of float32, float64 and complex dtype are passed to ``inner`` unchanged.
      Leaves of an integer or boolean dtype have no state: ``inner`` receives ``None``
      in place of them and of their gradients.
    * A master weight beyond the largest number of the weight's dtype, for float16 from
      65520, becomes infinite.
    * Derivatives do not pass through the update of a split weight.
    * The members of a ``jax.vmap`` share their random bits, until `seed_rounding` gives
      each member its own.
    * ``inner`` must return updates like its gradients. Put ``optax.lookahead``, whose
      updates are pairs, outside, for example
      ``optax.lookahead(split_master_weights(...), 5, 0.5)``.
    * A step that is compiled for the CPU with donated buffers makes temporary copies of
      weights and residuals, because XLA computes the two in separate loops. For an H100
      each array is one kernel.

    See `master_weights` for the float32 weights, and `split_weights` for the
    continuation of a float32 run.

    Args:
      inner: any transformation. It should be the whole optimizer, with learning rate,
        weight decay and `compress_state`, because a change of the updates after this
        transformation also changes the resulting weights.
      residual_bits: number of bits of each residual, 8 or 16.

    Returns:
      A gradient transformation with state `MasterWeightsState`. Its ``update`` needs
      ``params``, and passes further keyword arguments to ``inner``.

    Raises:
      ValueError: ``residual_bits`` is neither 8 nor 16; in ``update``, ``params`` is
        missing, or a leaf has another shape or dtype than in ``init``, or the residuals
        were stored for other dtypes or bits. In a compiled ``update`` that last case
        makes all split weights NaN.
      TypeError: in ``init``, a leaf is a float of fewer than 16 bits, or no array; in
        ``update``, the state is of another transformation, or a gradient is of an
        integer.

    Example:
      A thousand steps of 2^-10 are lost on a bfloat16 weight of 1, one by one:

      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> def train(tx, params):
      ...     def step(carry, _):
      ...         params, state = carry
      ...         gradient = jnp.ones_like(params)
      ...         updates, state = tx.update(gradient, state, params)
      ...         return (optax.apply_updates(params, updates), state), None
      ...     return jax.lax.scan(step, (params, tx.init(params)), length=1024)[0]
      >>> params = jnp.bfloat16(1.0)
      >>> print(train(optax.sgd(2.0**-10), params)[0])
      1
      >>> params, state = train(
      ...     optax_rms.split_master_weights(optax.sgd(2.0**-10)), params
      ... )
      >>> print(params, optax_rms.master_weights(params, state))
      0 0.0

    References:
      Kalamkar, Georganas, Srinivasan, Chen, Shiryaev and Heinecke, 2020, Optimizing
      Deep Learning Recommender Systems' Training On CPU Cluster Architectures
      (residuals of 16 bits: Split-SGD), https://arxiv.org/abs/2005.04680

      Gonzalez Ortiz, Gupta, Renard and Blalock, 2026, FlashOptim: Optimizers for Memory
      Efficient Training (of 8 bits, to the nearest), https://arxiv.org/abs/2602.23349
    """
    if residual_bits not in _RESIDUAL_DTYPES:
        raise ValueError(f"residual_bits must be 8 or 16, got {residual_bits!r}.")
    residual_dtype = _RESIDUAL_DTYPES[residual_bits]
    inner = optax.with_extra_args_support(inner)

    def init(params) -> Any:
        floats = _check_parameters(params)
        residual = jax.tree.map(
            lambda p: (
                full_like(p, 0, residual_dtype)
                if _is_split_dtype(p)
                else optax.MaskedNode()
            ),
            params,
        )
        inner_state = inner.init(jax.tree.map(_first_master_weight, floats))
        return MasterWeightsState(
            rounding_step=jnp.zeros([], jnp.uint32) if residual_bits == 8 else None,
            residual=residual,
            inner_state=state_like(floats, inner_state),
            formats=fingerprint(_description(residual, params)),
        )

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "split_master_weights needs params, got None: call "
                "update(gradients, state, params)."
            )
        checks.check_state_class("split_master_weights", state, MasterWeightsState)
        checks.check_inexact_leaves("gradients", updates)
        _check_leaves(state.residual, params, updates)
        intact = _check_residuals(state, params, residual_bits)
        residuals, treedef = jax.tree.flatten(state.residual, is_leaf=_is_absent)
        weights = treedef.flatten_up_to(params)
        gradients = treedef.flatten_up_to(updates)
        # Updates in the dtype of the weights would be rounded before they are added.
        wide = [
            g if _is_absent(r) or _is_absent(g) else jnp.asarray(g, jnp.float32)
            for r, g in zip(residuals, gradients, strict=True)
        ]
        changes, inner_state = inner.update(
            treedef.unflatten(wide),
            state.inner_state,
            checks.check_parameters(_join_tree(state.residual, params)),
            **extra_args,
        )
        changes = treedef.flatten_up_to(changes)
        # A restored step may be NumPy's, whose version 1 makes int64 of step + 1.
        step = state.rounding_step
        step = None if step is None else jnp.asarray(step)
        kinds = {
            WEIGHT_STREAM + i: w.shape
            for i, (w, r) in enumerate(zip(weights, residuals, strict=True))
            if not _is_absent(r)
        }
        numbers = leaf_numbers(kinds, step is None or intact)
        for i, (w, r, g) in enumerate(zip(weights, residuals, gradients, strict=True)):
            if _is_absent(r) or _is_absent(g):
                continue
            changes[i], residuals[i] = advance(
                w,
                r,
                reject(changes[i], unless=intact),
                step,
                numbers[WEIGHT_STREAM + i],
                in_own_dtype=jnp.result_type(g) == w.dtype,
                seed=state.rounding_seed,
            )
        state = state._replace(
            rounding_step=None if step is None else step + 1,
            residual=treedef.unflatten(residuals),
            inner_state=inner_state,
        )
        return treedef.unflatten(changes), state

    return optax.GradientTransformationExtraArgs(init, update)


def master_weights(params: PyTree, state: Any) -> PyTree:
    """The float32 weights that bfloat16 parameters and their residuals encode.

    The purpose is evaluation in float32, export, and training without
    `split_master_weights` from here on.

    Args:
      params: the parameters.
      state: the optimizer state of these parameters, a `MasterWeightsState` or any
        state that contains one or more `MasterWeightsState`.

    Returns:
      A tree like ``params``, with float32 in place of every leaf that is split.

    Raises:
      ValueError: ``state`` has no `MasterWeightsState`, or that of other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> tx = optax_rms.split_master_weights(optax.sgd(2.0**-20), residual_bits=16)
      >>> params = jnp.bfloat16(1.0)
      >>> _, state = tx.update(jnp.bfloat16(1.0), tx.init(params), params)
      >>> float(1 - optax_rms.master_weights(params, state)) == 2.0**-20
      True
    """
    states = [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)]
    if not states:
        raise ValueError(
            "state must contain the MasterWeightsState of split_master_weights; found "
            f"none in a {type(state).__name__}."
        )
    for s in states:
        residual = _in_nodes_of(params, s.residual)
        _check_leaves(residual, params)
        intact = _check_residuals(s._replace(residual=residual), params)
        params = _join_tree(residual, params, intact)
    return params


def split_weights(weights: PyTree, params: PyTree, state: Any) -> tuple[PyTree, Any]:
    """The bfloat16 parameters and the residuals that encode given float32 weights.

    The inverse of `master_weights`. The purpose is to continue a float32 run, or to
    start from a float32 checkpoint, with `split_master_weights` and without losing the
    16 bits that a cast to bfloat16 loses.

    Args:
      weights: a tree like ``master_weights(params, state)``, with float32 in place of
        every leaf that is split.
      params: the parameters whose dtypes the result gets, for example ``weights`` cast
        to bfloat16.
      state: the optimizer state for ``params``, for example ``tx.init(params)``. The
        inner state is not touched. To continue a float32 run with its optimizer state,
        use ``state._replace(inner_state=float32_state)``.

    Returns:
      Parameters like ``params``, and a state like ``state``. ``master_weights`` of the
      two is ``weights``, bit for bit with bfloat16 and residuals of 16 bits, and to the
      nearest otherwise (see `split_master_weights`). A finite weight that rounds beyond
      the largest number of the parameter's dtype becomes infinite.

    Raises:
      ValueError: ``state`` has no `MasterWeightsState`, or that of other parameters, or
        a leaf of ``weights`` has another shape or dtype than in
        ``master_weights(params, state)``.

    Example:
      A float32 run goes on with weights of two bytes and residuals of two bytes:

      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> weights, inner = jnp.array([0.1, 1 / 3]), optax.sgd(0.1, momentum=0.9)
      >>> _, float32_state = inner.update(weights, inner.init(weights))
      >>> tx = optax_rms.split_master_weights(inner, residual_bits=16)
      >>> params = weights.astype(jnp.bfloat16)
      >>> params, state = optax_rms.split_weights(weights, params, tx.init(params))
      >>> state = state._replace(inner_state=float32_state)
      >>> bool((params == weights).any())
      False
      >>> bool((optax_rms.master_weights(params, state) == weights).all())
      True

      The way back needs no further function:

      >>> weights = optax_rms.master_weights(params, state)
      >>> updates, float32_state = inner.update(weights, state.inner_state, weights)
    """
    _check_weights(weights, jax.eval_shape(master_weights, params, state))
    new_params = weights

    def fill(node: Any) -> Any:
        nonlocal new_params
        if not _is_state(node):
            return node
        residuals, treedef = jax.tree.flatten(node.residual, is_leaf=_is_absent)
        leaves = treedef.flatten_up_to(new_params)
        dtypes = [getattr(p, "dtype", None) for p in treedef.flatten_up_to(params)]
        for i, (r, dtype) in enumerate(zip(residuals, dtypes, strict=True)):
            if not _is_absent(r):
                leaves[i], residuals[i] = split(leaves[i], dtype, r.dtype)
        new_params = treedef.unflatten(leaves)
        return node._replace(residual=treedef.unflatten(residuals))

    state = jax.tree.map(fill, state, is_leaf=_is_state)
    return new_params, state


def _in_nodes_of(params: PyTree, residual: PyTree) -> PyTree:
    """The residuals in a tree like ``params``, if all leaves have the same paths.

    ``flax.nnx.Optimizer`` keeps its state in variables of another class than
    parameters.
    """
    rows, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_absent)
    own_rows = jax.tree_util.tree_leaves_with_path(residual, is_leaf=_is_absent)
    if [path for path, _ in rows] != [path for path, _ in own_rows]:
        return residual
    return treedef.unflatten(leaf for _, leaf in own_rows)


def _join_tree(
    residual: PyTree, params: PyTree, intact: bool | jax.Array = True
) -> PyTree:
    """``params`` with the float32 master weight in place of every split leaf."""
    return jax.tree.map(
        lambda r, p: p if _is_absent(r) else reject(join(p, r), unless=intact),
        residual,
        params,
        is_leaf=_is_absent,
    )


def _first_master_weight(leaf: Any) -> Any:
    """The float32 of a leaf that is split, also of a ``jax.ShapeDtypeStruct``."""
    if not _is_split_dtype(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
    return join(leaf, jnp.zeros_like(leaf, jnp.int16))


def _description(
    residual: PyTree, params: PyTree, residual_bits: int | None = None
) -> str:
    """What the numbers in the residuals mean, for their fingerprint."""
    residuals, treedef = jax.tree.flatten(residual, is_leaf=_is_absent)
    split = [
        (jnp.iinfo(r.dtype).bits, str(w.dtype))
        for r, w in zip(residuals, treedef.flatten_up_to(params), strict=True)
        if not _is_absent(r)
    ]
    if not split:
        return "no residuals"
    bits = residual_bits or split[0][0]
    return f"{bits} bits of {' and '.join(sorted({dtype for _, dtype in split}))}"


def _is_split_dtype(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) in (jnp.bfloat16, jnp.float16)


def _is_absent(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _is_state(node: Any) -> bool:
    return isinstance(node, MasterWeightsState)


def _check_parameters(params: PyTree) -> PyTree:
    """Return ``params`` with ``None`` for integers, or raise naming bad leaves."""
    floats = checks.check_parameters(params)
    narrow = [
        f"{leaf_name(path)} ({jnp.result_type(p)})"
        for path, p in jax.tree_util.tree_leaves_with_path(floats)
        if jnp.finfo(jnp.result_type(p)).bits < 16
    ]
    if narrow:
        raise TypeError(
            "split_master_weights splits parameters of bfloat16 and float16, and "
            "leaves wider parameters alone; these are narrower: "
            f"{', '.join(narrow)}. Cast them, for example to bfloat16, or leave them "
            "out with optax.masked."
        )
    return floats


def _check_residuals(
    state: MasterWeightsState, params: PyTree, residual_bits: int | None = None
) -> bool | jax.Array:
    """Whether residuals belong to weights of these dtypes and bits, if known."""
    if state.formats is None:
        return True
    formats = _description(state.residual, params, residual_bits)
    return check_fingerprint(
        "split_master_weights", state.formats, formats, _CONVERSION
    )


def _check_weights(weights: PyTree, expected: PyTree) -> None:
    """Raise a ``ValueError`` naming every leaf of another shape or dtype."""
    structure, expected_structure = map(jax.tree.structure, (weights, expected))
    if structure != expected_structure:
        raise ValueError(
            "weights must have the structure of master_weights(params, state), which "
            f"is {expected_structure}; got {structure}."
        )
    bad = [
        f"{leaf_name(path)} is {_describe(w)}, not {_describe(like)}"
        for (path, w), like in zip(
            jax.tree_util.tree_leaves_with_path(weights),
            jax.tree.leaves(expected),
            strict=True,
        )
        if _describe(w) != _describe(like)
    ]
    if bad:
        raise ValueError(
            "weights must have the shapes and dtypes of master_weights(params, state), "
            f"float32 for every leaf that is split; {'; '.join(bad)}."
        )


def _check_leaves(
    residual: PyTree, params: PyTree, updates: PyTree | None = None
) -> None:
    """Raise a ``ValueError`` naming every leaf that differs from the residuals.

    Without ``updates``, half-precision leaves may belong to another state.
    """
    treedef = jax.tree.structure(residual, is_leaf=_is_absent)
    rows = jax.tree_util.tree_leaves_with_path(residual, is_leaf=_is_absent)
    weights = treedef.flatten_up_to(params)
    gradients: list[Any] = [None] * len(rows)
    if updates is not None:
        gradients = treedef.flatten_up_to(updates)
    bad = []
    for (path, r), w, g in zip(rows, weights, gradients, strict=True):
        if _is_absent(r):
            wrong = updates is not None and _is_split_dtype(w)
        else:
            shapes = {jnp.shape(x) for x in (r, w, g) if not _is_absent(x)}
            wrong = not _is_split_dtype(w) or len(shapes) > 1
        if wrong:
            bad.append(
                f"{leaf_name(path)}: parameter {_describe(w)}, "
                f"gradient {_describe(g)}, residual {_describe(r)}"
            )
    if bad:
        raise ValueError(
            "parameters must have the shapes and dtypes, and gradients the shapes, of "
            "the parameters given to init of split_master_weights: a bfloat16 or "
            "float16 leaf has a residual of its shape, other leaves have none. These "
            f"differ: {'; '.join(bad)}."
        )


def _describe(leaf: Any) -> str:
    return "none" if _is_absent(leaf) else f"{jnp.result_type(leaf)}{jnp.shape(leaf)}"
