# SPDX-License-Identifier: Apache-2.0
"""RMSProp of Keras 3."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _leafwise as leafwise
from optax_rms import _rmsprop
from optax_rms._numerics import is_half, widen
from optax_rms._schedules import as_schedule, check_learning_rate
from optax_rms._types import LearningRate, Number, PyTree, Schedule
from optax_rms.dialects._shared import clipping
from optax_rms.dialects.keras import _schedules as schedules


class RMSpropState(NamedTuple):
    """State of `rmsprop`.

    Attributes:
      count: number of calls of ``update``, int32 scalar; Keras' ``iteration``.
      accumulated: sum of the gradients since the last step; ``None`` without
        accumulation.
      inner_state: state of ``optax_rms.rmsprop``: the moving averages of the gradients,
        and the momentum.
      average: moving average of the parameters, at least float32; ``None`` unless
        ``use_ema``. ``init`` makes a copy of the parameters, or, of a
        ``jax.ShapeDtypeStruct``, another one.

    Leaves of an integer or boolean dtype have ``None`` as state.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    accumulated: PyTree | None
    inner_state: Any
    average: PyTree | None


def rmsprop(
    learning_rate: LearningRate = 0.001,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-7,
    centered: bool = False,
    weight_decay: ArrayLike | None = None,
    clipnorm: ArrayLike | None = None,
    clipvalue: ArrayLike | None = None,
    global_clipnorm: ArrayLike | None = None,
    use_ema: bool = False,
    ema_momentum: ArrayLike = 0.99,
    ema_overwrite_frequency: int | None = None,
    gradient_accumulation_steps: int | None = None,
    *,
    exclude_from_weight_decay: PyTree | Callable[[PyTree], PyTree] | None = None,
    loss_scale_factor: None = None,
    name: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``keras.optimizers.RMSprop`` of Keras 3, and of tf.keras from 2.11 on.

    Updates equal those of Keras step for step, up to rounding. In this order:

    1. With ``gradient_accumulation_steps`` :math:`= k`, only every :math:`k`-th call
       takes a step, with the mean of the last :math:`k` gradients.
    2. The gradient :math:`g_t` is clipped.
    3. The parameters :math:`\theta` are decayed and moved:

       .. math::
         v_t &= \text{rho} \, v_{t-1} + (1 - \text{rho}) \, g_t^2 \\
         b_t &= \text{momentum} \, b_{t-1}
           + \text{learning_rate}_t \, g_t / \sqrt{v_t + \text{epsilon}} \\
         \theta_t &= (1 - \text{learning_rate}_t \, \text{weight_decay}) \, \theta_{t-1}
           - b_t

       from :math:`v_0 = b_0 = 0`. With ``centered``, the variance :math:`v_t - m_t^2`
       replaces :math:`v_t` under the root, where :math:`m_t` is the moving average of
       :math:`g_t`.
    4. With ``use_ema``, at every call, also between the steps of an accumulation,

       .. math::
         a \leftarrow \text{ema_momentum} \, a + (1 - \text{ema_momentum}) \, \theta

       from :math:`a = \theta` after the first step. With ``ema_overwrite_frequency``,
       the parameters become :math:`a` in the calls of every such step.

    Four differences from Keras:

    * Centered, Keras subtracts two nearly equal numbers. Rounding makes the difference
      negative and the root NaN as soon as a gradient hardly changes for a hundred
      steps. The variance here is a sum of squares and is never negative.
    * Keras keeps its state in the dtype of the parameters. State here is at least
      float32.
    * Keras squares a complex gradient as a complex number. The mean here is that of
      :math:`|g|^2`.
    * Keras applies the constraints of its variables. Project the parameters after
      ``optax.apply_updates`` instead.

    A gradient of ``None`` leaves the parameter and the averages of its gradients as
    they are, without decay, as in Keras. The average :math:`a` still follows the
    parameter, and may overwrite it. tf.keras leaves :math:`a` out there as well, and
    starts :math:`a` from the parameters before the first step.

    Args:
      learning_rate: a number of at least 0, a scalar array, or a schedule from the
        number of calls so far, starting at 0, to one of these, for example
        ``lambda count: 0.1 / (1 + count)``. The schedules of
        ``keras.optimizers.schedules`` are accepted whatever backend Keras runs on;
        classes derived from them must compute with JAX.
      rho: weight of the past in the moving averages, in [0, 1].
      momentum: weight of the past in the momentum, in [0, 1]; the number 0 for none.
      epsilon: added to the mean square, inside the root; at least 0.
      centered: whether to divide by the standard deviation of the gradient.
      weight_decay: fraction of the parameters, times the learning rate, that every step
        subtracts; at least 0. ``update`` then needs the parameters.
      clipnorm: upper bound of the L2 norm of the gradient of each parameter array.
        Longer gradients are scaled down. More than 0.
      clipvalue: upper bound of the absolute value of the elements of gradients. More
        than 0.
      global_clipnorm: upper bound of the L2 norm of all gradients together. If the norm
        is not finite, all updates are NaN, as in Keras. At most one of ``clipnorm``,
        ``clipvalue`` and ``global_clipnorm`` can be given.
      use_ema: whether to average the parameters. ``update`` then needs the parameters.
      ema_momentum: weight of the past in the average of the parameters, in [0, 1].
      ema_overwrite_frequency: number of steps, at least 1, after which the average
        overwrites the parameters; ``None`` for never. Without ``use_ema`` it has no
        effect.
      gradient_accumulation_steps: calls per step, at least 2; ``None`` for 1.
      exclude_from_weight_decay: a tree of bools like the parameters, or a function from
        the parameters to such a tree, with ``True`` where weights do not decay, for
        example ``{"kernel": False, "bias": True}``. In Keras, this is a method.
      loss_scale_factor: must be ``None``; divide the gradients instead.
      name: must be ``None``; transformations have no names.

    Returns:
      A gradient transformation with the state `RMSpropState`. With ``use_ema``, the
      averaged parameters are ``state.average``, or ``optax.tree.get(state, "average")``
      in the state of a larger optimizer. Keras assigns them to the parameters at the
      end of ``fit``; nothing does so here.

    Raises:
      ValueError: a number is out of range, an option has no meaning here, two kinds of
        clipping are given; in ``update``, the parameters are missing, every gradient is
        ``None``, or a gradient has another shape than its parameter.
      TypeError: an argument is no number or flag; in ``update``, a gradient is neither
        floating-point nor complex.

    Example:
      Steps of two calls each, and the mean of the parameters after each call:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_rms import dialects
      >>> averaging = dict(use_ema=True, ema_momentum=0.5)
      >>> tx = dialects.keras.rmsprop(
      ...     1.0, rho=0.0, gradient_accumulation_steps=2, **averaging
      ... )
      >>> params = jnp.array(0.0)
      >>> state = tx.init(params)
      >>> for gradient in [-3.0, -1.0, 2.0, 4.0, 1.0, 1.0]:
      ...     updates, state = tx.update(jnp.array(gradient), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{params:.3f} {state.average:.3f}")
      0.000 0.000
      1.000 1.000
      1.000 1.000
      0.000 0.500
      0.000 0.250
      -1.000 -0.375

    References:
      Keras 3, RMSprop, https://keras.io/api/optimizers/rmsprop/
    """
    checks.reject_options(
        loss_scale_factor=(
            loss_scale_factor,
            None,
            "Divide the gradients by it instead.",
        ),
        name=(name, None, "optax.named_chain gives names to states."),
    )
    momentum = checks.check_number("momentum", momentum, 0, 1)
    calls_per_step = checks.check_steps(
        "gradient_accumulation_steps", gradient_accumulation_steps, 2, optional=True
    )
    averages = checks.check_flag("use_ema", use_ema)
    ema_momentum = checks.check_number("ema_momentum", ema_momentum, 0, 1)
    settings = _Settings(
        schedule=_as_schedule(learning_rate),
        inner=functools.partial(
            _rmsprop.rmsprop,
            decay=checks.check_number("rho", rho, 0, 1),
            eps=checks.check_number("epsilon", epsilon),
            centered=checks.check_flag("centered", centered),
            momentum=None if checks.is_zero(momentum) else momentum,
        ),
        clip=_clipping(clipnorm, clipvalue, global_clipnorm),
        weight_decay=(
            None
            if weight_decay is None
            else checks.check_number("weight_decay", weight_decay)
        ),
        exclude_from_weight_decay=exclude_from_weight_decay,
        calls_per_step=calls_per_step or 1,
        ema_momentum=ema_momentum if averages else None,
        steps_per_overwrite=checks.check_steps(
            "ema_overwrite_frequency", ema_overwrite_frequency, optional=True
        ),
    )
    accumulates = settings.calls_per_step > 1
    period = settings.calls_per_step * (settings.steps_per_overwrite or 1)

    def init(params) -> Any:
        params = checks.check_parameters(params)
        return RMSpropState(
            # The learning rate is no part of the state.
            inner_state=settings.inner(0.0).init(params),
            count=jnp.zeros([], jnp.int32),
            accumulated=leafwise.accumulator(params) if accumulates else None,
            average=jax.tree.map(_wide_copy, params) if averages else None,
        )

    def update(updates, state, params=None) -> Any:
        checks.check_state_class("keras.rmsprop", state, RMSpropState)
        checks.check_inexact_leaves("gradients", updates)
        _check_some_gradient(updates)
        if params is None and (averages or settings.weight_decay is not None):
            raise ValueError(
                "with weight_decay or use_ema, update needs the parameters: "
                "tx.update(gradients, state, params)."
            )
        rate = settings.schedule(state.count)
        gradients = _map(widen, updates)
        if accumulates:
            changes, state = _accumulate(settings, rate, gradients, state, params)
        else:
            inner_state = state.inner_state
            changes, inner_state = _step(settings, rate, gradients, inner_state, params)
            state = state._replace(inner_state=inner_state)
        updates = _map(lambda u, g: u.astype(jnp.result_type(g)), changes, updates)
        if averages:
            updates, state = _average(settings, updates, state, params)
        return updates, state._replace(count=_increment(state.count, period))

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


class _Settings(NamedTuple):
    """The arguments of `rmsprop`, checked.

    Attributes:
      schedule: the learning rate, from the number of calls.
      inner: the function from a learning rate to the transformation of one step.
      clip: the function that clips a tree of gradients.
      weight_decay: ``None`` for no decay.
      exclude_from_weight_decay: as in `rmsprop`.
      calls_per_step: 1 without accumulation.
      ema_momentum: ``None`` without an average of the parameters.
      steps_per_overwrite: ``None`` if the average never overwrites the parameters.
    """

    schedule: Callable[[jax.Array], Any]
    inner: Callable[..., optax.GradientTransformation]
    clip: Callable[[PyTree], PyTree]
    weight_decay: Number | None
    exclude_from_weight_decay: PyTree | Callable[[PyTree], PyTree] | None
    calls_per_step: int
    ema_momentum: Any
    steps_per_overwrite: int | None


def _step(
    settings: _Settings,
    rate: Number,
    gradients: PyTree,
    inner_state: Any,
    params: PyTree | None,
) -> tuple[PyTree, Any]:
    """Clip, take a step of RMSProp, and decay the weights."""
    tx = settings.inner(rate)
    changes, inner_state = tx.update(settings.clip(gradients), inner_state)
    if settings.weight_decay is not None:
        mask = settings.exclude_from_weight_decay
        mask = mask(params) if callable(mask) else mask
        shrink = functools.partial(_add, -rate * settings.weight_decay)
        masks = [] if mask is None else [mask]
        changes = _map(shrink, changes, params, *masks)
    return changes, inner_state


def _accumulate(
    settings: _Settings,
    rate: Number,
    gradients: PyTree,
    state: RMSpropState,
    params: PyTree | None,
) -> tuple[PyTree, RMSpropState]:
    """Add the gradients up; in every k-th call, take a step with their mean."""
    calls = settings.calls_per_step
    _check_shapes(gradients, state.accumulated)
    total = _map(jnp.add, gradients, state.accumulated)
    is_step = state.count % calls + 1 == calls

    def advance(total, inner_state, params):
        mean = _map(lambda g: g / calls, total)
        return _step(settings, rate, mean, inner_state, params)

    def wait(total, inner_state, params):
        del params
        return _map(jnp.zeros_like, total), inner_state

    # Operands, because arrays that a branch closes over lose their sharding.
    changes, inner_state = jax.lax.cond(
        is_step, advance, wait, total, state.inner_state, params
    )
    accumulated = jax.tree.map(
        lambda old, new: old if new is None else jnp.where(is_step, 0, new),
        state.accumulated,
        total,
    )
    return changes, state._replace(accumulated=accumulated, inner_state=inner_state)


def _average(
    settings: _Settings, updates: PyTree, state: RMSpropState, params: PyTree
) -> tuple[PyTree, RMSpropState]:
    """Average the parameters after ``updates``; with it, overwrite them at times."""
    steps_before = state.count // settings.calls_per_step
    weight = jnp.where(steps_before == 0, 0, settings.ema_momentum)
    mix = functools.partial(_mix, weight)
    average = _map(mix, state.average, params, updates)
    if (frequency := settings.steps_per_overwrite) is not None:
        overwrites = steps_before % frequency == frequency - 1
        move = functools.partial(_move, overwrites)
        updates = _map(move, average, params, updates)
    return updates, state._replace(average=average)


def _increment(count: jax.Array, period: int) -> jax.Array:
    """The next count; after the largest count, counting goes on one period earlier."""
    last = count == jnp.iinfo(count.dtype).max
    return jnp.where(last, count - (period - 1), count + 1)


def _as_schedule(learning_rate: LearningRate) -> Schedule:
    if callable(learning_rate):
        try:
            inspect.signature(learning_rate).bind(0)
        except TypeError:
            raise TypeError(
                "learning_rate must be a number or a function of the step count, got "
                f"{learning_rate!r}, which cannot be called with a count. Keras calls "
                "a function without arguments anew at every step; JAX would trace it "
                "once."
            ) from None
        return schedules.from_object(learning_rate)
    return as_schedule(check_learning_rate("learning_rate", learning_rate))


def _check_some_gradient(gradients: PyTree) -> None:
    leaves = jax.tree.leaves(gradients, is_leaf=lambda g: g is None)
    if leaves and all(g is None for g in leaves):
        raise ValueError(
            "gradients must not all be None. Which parameters are trained?"
        )


def _check_shapes(gradients: PyTree, accumulated: PyTree) -> None:
    """Raise an error for a gradient of another shape, which the sum would broadcast."""
    leaves, treedef = jax.tree.flatten(gradients, is_leaf=lambda g: g is None)
    checks.check_state_shapes(gradients, leaves, [[treedef.flatten_up_to(accumulated)]])


def _clipping(
    clipnorm: ArrayLike | None,
    clipvalue: ArrayLike | None,
    global_clipnorm: ArrayLike | None,
) -> Callable[[PyTree], PyTree]:
    """The function that clips a tree of gradients."""
    kinds: dict[str, tuple[Any, Callable[[PyTree, Any], PyTree]]] = {
        "clipnorm": (clipnorm, clipping.clip_by_norm),
        "clipvalue": (clipvalue, clipping.clip_by_value),
        "global_clipnorm": (global_clipnorm, clipping.clip_by_global_norm),
    }
    given = [name for name, (limit, _) in kinds.items() if limit is not None]
    if not given:
        return lambda gradients: gradients
    if len(given) > 1:
        raise ValueError(f"only one kind of clipping can be used, got {given}.")
    limit, function = kinds[given[0]]
    hint = "For no clipping, pass None."
    limit = checks.check_number(given[0], limit, exclude_low=True, hint=hint)
    return lambda gradients: function(gradients, limit)


def _map(function: Callable[..., Any], tree: PyTree, *trees: PyTree) -> PyTree:
    """Map over the leaves of ``tree``, where ``None`` gives ``None``."""
    return jax.tree.map(
        lambda x, *xs: None if x is None else function(x, *xs),
        tree,
        *trees,
        is_leaf=lambda x: x is None,
    )


def _as(like: jax.Array, x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, like.dtype)


def _wide_copy(p: Any) -> Any:
    """A copy of at least float32, abstract where ``p`` is."""
    if isinstance(p, jax.ShapeDtypeStruct):
        if not is_half(p):
            return p
        return jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding)
    # A shared buffer could not be donated with both the parameters and the state.
    return jnp.array(widen(p), copy=True)


def _add(
    factor: ArrayLike, u: jax.Array, p: ArrayLike, is_excluded: bool = False
) -> jax.Array:
    """``u + factor * p``, in the precision of ``u``."""
    return u if is_excluded else u + _as(u, factor) * _as(u, p)


def _mix(
    weight: jax.Array, average: jax.Array, p: ArrayLike, u: jax.Array | None
) -> jax.Array:
    """The average after the parameters have moved by ``u``, if anywhere."""
    p = jnp.asarray(p)
    if u is not None:
        p = (_as(average, p) + _as(average, u)).astype(p.dtype)
    weight = _as(average, weight)
    return weight * average + (1 - weight) * _as(average, p)


def _move(
    overwrites: jax.Array, average: jax.Array, p: ArrayLike, u: jax.Array | None
) -> jax.Array:
    """``u``, or, where the average overwrites ``p``, the difference of the two."""
    u = jnp.zeros_like(p) if u is None else u
    return jnp.where(overwrites, (average - _as(average, p)).astype(u.dtype), u)
