# SPDX-License-Identifier: Apache-2.0
"""The wrapper for bfloat16 parameters: weights that train as if they were float32."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_rms import _checks as checks
from optax_rms._leaf_names import leaf_name
from optax_rms._types import PyTree
from optax_rms.storage._rounding import rounding_bits

_RESIDUAL_DTYPES = {8: jnp.int8, 16: jnp.int16}

# Moments stored by an inner `compress_state` number their leaves from 0. Sharing their
# rounding noise would correlate the rounding of a weight with that of its step.
_STREAM = 1 << 30

# Bit patterns of float32: 2^-14, the least normal float16, and 2^16, the first number
# above all of them; and the difference of the exponent biases, 127 - 15, in place.
_F16_NORMAL = 113 << 23
_F16_TOP = 143 << 23
_F16_REBIAS = 112 << 23


class MasterWeightsState(NamedTuple):
    """State of `split_master_weights`.

    Attributes:
      rounding_step: number of updates so far, modulo 2^32, uint32 scalar, from which
        the stochastic rounding draws; ``None`` with residuals of 16 bits.
      residual: what rounding took from each weight, int8 or int16 of the weight's
        shape, in 2^-8 or 2^-16 of the spacing of the weight's dtype;
        ``optax.MaskedNode`` for a leaf that is not split.
      inner_state: state of the wrapped transformation, made for float32 weights.
    """

    rounding_step: jax.Array | None
    residual: PyTree
    inner_state: Any


def split_master_weights(
    inner: optax.GradientTransformation, residual_bits: int = 8
) -> optax.GradientTransformationExtraArgs:
    r"""Train bfloat16 weights as if they were float32: keep what rounding takes.

    A bfloat16 weight has 8 significant bits. A step shorter than 2^-9 of the weight
    rounds away, and training stalls. Here the weights stay bfloat16 (or float16) for
    the model, and the rounding residual of each lives in the optimizer state. With
    weight :math:`\theta`, residual :math:`r` and gradient :math:`g`,

    .. math::
      w_t &= (\theta_{t-1} + r_{t-1}) + \text{inner}(g_t, \; \theta_{t-1} + r_{t-1}) \\
      \theta_t &= \text{round}(w_t), \qquad r_t = w_t - \theta_t, \qquad r_0 = 0

    in float32, rounding to the nearest (ties away from zero). The returned update is
    the one with which ``optax.apply_updates`` arrives at :math:`\theta_t`, bit for bit.
    ``inner`` sees gradients and weights in float32 and keeps a float32 state, so that
    small steps and weight decay act on the master weights :math:`\theta + r`.

    ========  =============  ===========================  ========================
    weight    residual_bits  master weight                bytes, weight + residual
    ========  =============  ===========================  ========================
    bfloat16  16             float32                      4
    bfloat16  8              16 significant bits          3
    float16   16             float32, from 2^-17 to 2^16  4
    float16   8              19 significant bits          3
    ========  =============  ===========================  ========================

    With 8 bits the master weight is rounded stochastically, to either neighbour with
    the probability that makes it exact on average: steps of any length count, a zero
    step changes nothing, and each step adds an error below 2^-15 (float16: 2^-18) of
    the weight. A float16 weight below 2^-14 has the spacing of 2^-14; the master weight
    is there a multiple of 2^-32, and with 16 bits below 2^-17 a multiple of 2^-40.

    The update has the gradient's dtype. In the weight's own dtype there is no number
    for some steps that flip the sign of a weight, halve or double it. Such a step, and
    only such a step, is off by up to 2^-7 of its length (float16: 2^-10); its gradient
    came rounded by up to 2^-8 (2^-11). Gradients cast to float32 give a float32 update
    without this loss. With 16 bits and bfloat16, master weights are then those of a
    float32 run, bit for bit, unless a step cancels a weight but for 2^-14 of it, where
    an error of 2^-24 of the step can arise. ``optax.apply_updates`` adds float32 to
    bfloat16 only under JAX's standard dtype promotion.

    Leaves of float32, float64 and complex dtype go to ``inner`` unchanged. A master
    weight beyond the largest number of the weight's dtype, for float16 from 65520, is
    infinite. Derivatives do not pass through the update of a split weight. ``inner``
    must return updates like its gradients: let ``optax.lookahead`` wrap. Compiled for
    the CPU, a step with donated buffers makes temporary copies of weights and
    residuals, because XLA computes the two in separate loops; for an H100 it is one
    kernel per array.

    Args:
      inner: any transformation. It should be the whole optimizer, with learning rate,
        weight decay and `compress_state`: whatever changes the updates afterwards also
        changes where the weights arrive.
      residual_bits: bits that are kept of each residual, 8 or 16.

    Returns:
      A gradient transformation with state `MasterWeightsState`. Its ``update`` needs
      ``params``, and hands further keyword arguments to ``inner``.

    Raises:
      ValueError: ``residual_bits`` is neither 8 nor 16; in ``update``, ``params`` is
        missing, or a leaf is not what ``init`` saw.
      TypeError: in ``init``, a leaf is an integer or a float of fewer than 16 bits; in
        ``update``, the state is of another transformation.

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
        _check_parameters(params)
        residual = jax.tree.map(
            lambda p: (
                jnp.zeros_like(p, residual_dtype) if _is_half(p) else optax.MaskedNode()
            ),
            params,
        )
        return MasterWeightsState(
            rounding_step=jnp.zeros([], jnp.uint32) if residual_bits == 8 else None,
            residual=residual,
            inner_state=inner.init(_join_tree(residual, params)),
        )

    def update(updates, state, params=None, **extra_args) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "split_master_weights needs the parameters, whose residuals it keeps: "
                "call update(gradients, state, params)."
            )
        checks.check_state_class("split_master_weights", state, MasterWeightsState)
        residuals, treedef = jax.tree.flatten(state.residual, is_leaf=_is_absent)
        weights = treedef.flatten_up_to(params)
        gradients = treedef.flatten_up_to(updates)
        _check_leaves(state.residual, params, updates)
        # Updates in the weights' dtype would be rounded before they could add up.
        wide = [
            g if _is_absent(r) or _is_absent(g) else jnp.asarray(g, jnp.float32)
            for r, g in zip(residuals, gradients, strict=True)
        ]
        changes, inner_state = inner.update(
            treedef.unflatten(wide),
            state.inner_state,
            _join_tree(state.residual, params),
            **extra_args,
        )
        changes = treedef.flatten_up_to(changes)
        step = state.rounding_step
        for i, (w, r, g) in enumerate(zip(weights, residuals, gradients, strict=True)):
            if _is_absent(r) or _is_absent(g):
                continue
            in_own_dtype = jnp.result_type(g) == w.dtype
            changes[i], residuals[i] = _advance(w, r, changes[i], step, i, in_own_dtype)
        state = MasterWeightsState(
            rounding_step=None if step is None else step + 1,
            residual=treedef.unflatten(residuals),
            inner_state=inner_state,
        )
        return treedef.unflatten(changes), state

    return optax.GradientTransformationExtraArgs(init, update)


def master_weights(params: PyTree, state: Any) -> PyTree:
    """The float32 weights that bfloat16 parameters and their residuals encode.

    For evaluation in float32, for export, and to go on without `split_master_weights`.

    Args:
      params: the parameters.
      state: the optimizer state that belongs to them, `MasterWeightsState` or any state
        that contains one or more of them.

    Returns:
      A tree like ``params``, with float32 in place of every leaf that is split.

    Raises:
      ValueError: ``state`` has no `MasterWeightsState`, or one of other parameters.

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
        params = _join_tree(residual, params)
    return params


def _in_nodes_of(params: PyTree, residual: PyTree) -> PyTree:
    """The residuals in a tree like ``params``, if all leaves have the same paths.

    ``flax.nnx.Optimizer`` keeps its state in variables of a class of its own.
    """
    rows, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_absent)
    own_rows = jax.tree_util.tree_leaves_with_path(residual, is_leaf=_is_absent)
    if [path for path, _ in rows] != [path for path, _ in own_rows]:
        return residual
    return treedef.unflatten(leaf for _, leaf in own_rows)


def _join_tree(residual: PyTree, params: PyTree) -> PyTree:
    """``params`` with the float32 master weight in place of every split leaf."""
    return jax.tree.map(
        lambda r, p: p if _is_absent(r) else _join(p, r),
        residual,
        params,
        is_leaf=_is_absent,
    )


@jax.jit
def _join(weight, residual):
    """The master weight that a weight and its residual encode."""
    shift = 16 - jnp.iinfo(residual.dtype).bits
    bits = jax.lax.bitcast_convert_type(weight, jnp.int16).astype(jnp.int32)
    ordinal = ((bits & 0x7FFF) << 16) + (residual.astype(jnp.int32) << shift)
    # A weight of 0 may stand for a master weight of the other sign.
    negative = (bits < 0) ^ (ordinal < 0)
    magnitude = _from_ordinal(jnp.abs(ordinal), weight.dtype)
    return jnp.where(negative, -magnitude, magnitude)


@functools.partial(jax.jit, static_argnames="in_own_dtype")
def _advance(weight, residual, change, step, leaf, in_own_dtype):
    """Add ``change`` to the master weight; return the update and the new residual."""
    bits = jnp.iinfo(residual.dtype).bits
    dtype = weight.dtype
    master = _join(weight, residual) + change.astype(jnp.float32)
    ordinal = _to_ordinal(jnp.abs(master), dtype)
    if bits == 8:
        noise = rounding_bits(weight.shape, step, leaf + _STREAM) >> 24
        ordinal = (ordinal + noise.astype(jnp.int32)) & ~0xFF
    new = jnp.copysign(_nearest(ordinal, dtype), master)
    old = _join(weight, jnp.zeros_like(residual))
    update = new - old
    if in_own_dtype:
        rounded = _nearest(_to_ordinal(jnp.abs(update), dtype), dtype)
        update = jnp.copysign(rounded, update)
    update = jnp.where(jnp.isfinite(master), update, master)
    # The sum of `optax.apply_updates`. It is ``new`` if ``new - old`` is a number of
    # the update's dtype: always, within a factor of 2 (Sterbenz, 1974). Elsewhere the
    # sum stands, and the residual makes up for what it can. Summing in float32 or in
    # ``dtype`` is the same, since float32 has more than twice the significant bits.
    landed = (old + update).astype(dtype)
    landed_bits = jax.lax.bitcast_convert_type(landed, jnp.int16).astype(jnp.int32)
    same_sign = (landed_bits < 0) == jnp.signbit(master)
    rest = jnp.where(same_sign, ordinal, -ordinal) - ((landed_bits & 0x7FFF) << 16)
    rest = jnp.clip(rest, -0x8000, 0x7FFF)
    rest = jnp.where(jnp.isfinite(landed), rest, 0)
    residual = (rest >> (16 - bits)).astype(residual.dtype)
    return update.astype(dtype) if in_own_dtype else update, residual


def _nearest(ordinal, dtype):
    """The number of ``dtype`` that is nearest to an ordinal, as a float32.

    Rounding an integer: XLA may drop a float32 -> bfloat16 -> float32 round trip, and
    the residual with it, and `jax.lax.reduce_precision` flushes subnormal float16.
    """
    return _from_ordinal((ordinal + 0x8000) >> 16 << 16, dtype)


def _to_ordinal(magnitude, dtype):
    """The bits that ``magnitude`` has in ``dtype`` with 16 more mantissa bits."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    if dtype == jnp.bfloat16:
        return bits
    normal = (jnp.minimum(bits, _F16_TOP) - _F16_REBIAS) << 3
    subnormal = jax.lax.round(
        magnitude * 2.0**40, jax.lax.RoundingMethod.TO_NEAREST_EVEN
    )
    return jnp.where(bits < _F16_NORMAL, subnormal.astype(jnp.int32), normal)


def _from_ordinal(ordinal, dtype):
    """The inverse of `_to_ordinal`, infinity and NaN included."""
    if dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(ordinal, jnp.float32)
    special = ordinal >= (_F16_TOP - _F16_REBIAS) << 3
    rebias = jnp.where(special, 2 * _F16_REBIAS, _F16_REBIAS)
    normal = jax.lax.bitcast_convert_type((ordinal >> 3) + rebias, jnp.float32)
    return jnp.where(ordinal < 1 << 26, ordinal.astype(jnp.float32) * 2.0**-40, normal)


def _is_half(leaf) -> bool:
    return getattr(leaf, "dtype", None) in (jnp.bfloat16, jnp.float16)


def _is_absent(leaf) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _is_state(node) -> bool:
    return isinstance(node, MasterWeightsState)


def _check_parameters(params):
    """Raise a ``TypeError`` naming every leaf that cannot be trained."""
    checks.check_inexact_leaves("parameters", params)
    narrow = [
        f"{leaf_name(path)} ({jnp.result_type(p)})"
        for path, p in jax.tree_util.tree_leaves_with_path(params)
        if jnp.finfo(jnp.result_type(p)).bits < 16
    ]
    if narrow:
        raise TypeError(
            "split_master_weights keeps residuals of bfloat16 and float16, and leaves "
            f"wider parameters alone; these are narrower: {', '.join(narrow)}. Cast "
            "them, or leave them out with optax.masked."
        )


def _check_leaves(residual, params, updates=None):
    """Raise a ``ValueError`` naming every leaf that is not what ``init`` saw.

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
            wrong = updates is not None and _is_half(w)
        else:
            shapes = {jnp.shape(x) for x in (r, w, g) if not _is_absent(x)}
            wrong = not _is_half(w) or len(shapes) > 1
        if wrong:
            bad.append(
                f"{leaf_name(path)}: parameter {_describe(w)}, "
                f"gradient {_describe(g)}, residual {_describe(r)}"
            )
    if bad:
        raise ValueError(
            "Parameters and gradients must have the shapes, and parameters the dtypes, "
            "that init of split_master_weights saw: a bfloat16 or float16 leaf has a "
            f"residual of its shape, others have none. These differ: {'; '.join(bad)}."
        )


def _describe(leaf):
    return "none" if _is_absent(leaf) else f"{jnp.result_type(leaf)}{jnp.shape(leaf)}"
