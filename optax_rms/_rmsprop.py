# SPDX-License-Identifier: Apache-2.0
"""The optimizer: a chain of the preconditioner, the learning rate and the momentum."""

import functools
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optax_rms import _checks as checks
from optax_rms._leafwise import Step, accumulator, chain
from optax_rms._numerics import cast
from optax_rms._scale_by_rms import rms_step
from optax_rms._schedules import check_learning_rate
from optax_rms._types import LearningRate


def _scale(g, factor):
    return (cast(factor, g.dtype) * g,)


def _learning_rate_step(learning_rate: LearningRate) -> Step:
    """``optax.scale_by_learning_rate``: multiply by minus the learning rate."""
    rate = check_learning_rate(
        "learning_rate", learning_rate, hint="To maximise, negate the gradients."
    )
    if callable(rate):
        schedule: Any = rate
        return Step(
            optax.ScaleByScheduleState,
            _scale,
            numbers=lambda count: -schedule(count),
            counts=True,
        )
    return Step(optax.EmptyState, _scale, numbers=lambda count: -rate)


def _pass_on(g, nothing):
    del nothing
    return (g,)


def _heavy_ball(g, momentum, trace):
    trace = g + cast(momentum, g.dtype) * trace
    return trace, trace


def _nesterov(g, momentum, trace):
    trace = g + cast(momentum, g.dtype) * trace
    return g + cast(momentum, g.dtype) * trace, trace


def _momentum_step(
    momentum: ArrayLike | None, nesterov: bool, accumulator_dtype: DTypeLike | None
) -> Step:
    """``optax.trace``, or nothing if there is no momentum."""
    nesterov = checks.check_flag("nesterov", nesterov)
    if momentum is None:
        return Step(optax.EmptyState, _pass_on)
    momentum = checks.check_number("momentum", momentum, 0, 1)
    dtype = checks.check_accumulator_dtype("accumulator_dtype", accumulator_dtype)
    return Step(
        optax.TraceState,
        _nesterov if nesterov else _heavy_ball,
        numbers=lambda count: momentum,
        fields={"trace": functools.partial(accumulator, dtype=dtype)},
    )


def rmsprop(
    learning_rate: LearningRate,
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    lr_in_momentum: bool = True,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RMSProp: divide the gradient by a running average of its recent magnitude.

    Each parameter moves by about the learning rate per step, whatever the scale of the
    gradient. A drop-in for ``optax.rmsprop``: the same arguments, the same state, and
    the same trajectory to the rounding of float32. Two things differ: ``centered=True``
    keeps the variance itself and never produces NaN, and averages and momentum of
    half-precision parameters are float32.

    With the preconditioned gradient :math:`u_t` of `scale_by_rms`, whose equations
    contain ``decay``, ``eps`` and ``initial_scale``, the parameters change by
    :math:`\theta_t - \theta_{t-1} =`

    .. math::
      -\text{learning_rate}_t \, u_t
        \quad &\text{without momentum} \\
      b_t = \text{momentum} \, b_{t-1} - \text{learning_rate}_t \, u_t
        \quad &\text{with lr_in_momentum (TensorFlow, Keras, Optax)} \\
      -\text{learning_rate}_t \, b_t, \quad b_t = \text{momentum} \, b_{t-1} + u_t
        \quad &\text{without lr_in_momentum (PyTorch)}

    from :math:`b_0 = 0`. The last two differ as soon as the learning rate changes. With
    ``nesterov``, :math:`b_t` is replaced, in the change only, by
    :math:`\text{momentum} \, b_t` plus the term that was added to form :math:`b_t`.

    The arithmetic between gradient and update is float32, or float64 for float64
    leaves; the update has the dtype of the gradient. The state holds 4 bytes per
    element, 8 with momentum or ``centered``, 12 with both.

    Leaves of an integer or boolean dtype, for example those of
    ``eqx.filter(model, eqx.is_array)``, have no state, and their update is ``None``.

    Args:
      learning_rate: a number of at least 0, a scalar array, or a schedule: a function
        from the step count, starting at 0, to a number. A run that may get a schedule
        later can begin with ``optax.constant_schedule(1e-3)``, whose state has the
        step count; `adapt_state` converts other states.
      decay: weight of the past in the moving average, in [0, 1].
      eps: added to the mean square, or to the root of the mean square; at least 0.
        Inside the root, 1e-8 shortens the steps of gradients below 1e-4, for example
        to 0.01 learning rates for gradients of 1e-6; outside, only the steps of
        gradients below 1e-8.
      initial_scale: start of the mean square (of the variance, if ``centered``).
      eps_in_sqrt: whether ``eps`` is added inside the root.
      centered: whether to divide by the standard deviation of the gradient, the root
        mean square about the moving average of the gradient. Where the gradient hardly
        changes, the deviation falls to 0 and the step grows up to
        ``learning_rate * g / sqrt(eps)``: the papers with ``centered`` take an ``eps``
        of 1e-4 to 1e-2. ``optax.chain(scale_by_rms(centered=True), optax.clip(10.0),
        optax.scale(-1e-3))`` bounds a step to ten learning rates.
      momentum: weight of the past in the momentum, in [0, 1]; ``None`` for none.
      nesterov: whether to look ahead by one momentum step.
      bias_correction: whether to divide the averages by the sum of their weights. With
        ``centered``, the first step is then ``g / sqrt(eps)`` learning rates long.
      lr_in_momentum: whether the learning rate is applied before the momentum buffer,
        which then has the unit of the parameters, or after the buffer.
      accumulator_dtype: dtype of averages and momentum; ``None`` is at least float32.
        Under ``optax.inject_hyperparams``, write ``"float32"``, because every callable
        such as ``jnp.float32`` is a schedule there.

    Returns:
      A gradient transformation. The state is the tuple that ``optax.chain`` has for
      the same steps: the state of `scale_by_rms`, then ``optax.EmptyState`` or
      ``ScaleByScheduleState`` for the learning rate and ``TraceState`` or
      ``EmptyState`` for the momentum, these two swapped if not ``lr_in_momentum``.

    Raises:
      ValueError: a number is out of range; in ``update``, a gradient has another shape
        than its parameter.
      TypeError: an argument is no number or flag, is a float16, or is a ``decay`` or
        ``momentum`` in half precision; in ``init``, a leaf is no array; in ``update``,
        a gradient is neither floating-point nor complex, or the state is that of other
        options.

    Example:
      Gradients of 1 and of 1e6 with a learning rate of 0.1. A decay of 0 forgets the
      past at once, so that every step is 0.1 long:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_rms
      >>> params = jnp.array([1.0, 1.0])
      >>> tx = optax_rms.rmsprop(0.1, decay=0.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     gradients = jnp.array([1.0, 1e6])
      ...     updates, state = tx.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params.round(5))
      [0.7 0.7]

      The place of the learning rate shows as soon as the rate changes:

      >>> halved = optax.piecewise_constant_schedule(1.0, {1: 0.5})
      >>> for lr_in_momentum in (True, False):
      ...     tx = optax_rms.rmsprop(
      ...         halved, decay=0.0, momentum=0.5, lr_in_momentum=lr_in_momentum
      ...     )
      ...     _, state = tx.update(jnp.array(3.0), tx.init(jnp.array(0.0)))
      ...     print(tx.update(jnp.array(3.0), state)[0])
      -1.0
      -0.75

    References:
      Hinton, Srivastava and Swersky, 2012, Neural Networks for Machine Learning,
      lecture 6e, slide 29,
      https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf

      Graves, 2013, Generating Sequences With Recurrent Neural Networks, eq. 38-45
      (centered, with momentum), https://arxiv.org/abs/1308.0850
    """
    rms = rms_step(
        decay=decay,
        eps=eps,
        initial_scale=initial_scale,
        eps_in_sqrt=eps_in_sqrt,
        bias_correction=bias_correction,
        centered=centered,
        accumulator_dtype=accumulator_dtype,
    )
    scale = _learning_rate_step(learning_rate)
    trace = _momentum_step(momentum, nesterov, accumulator_dtype)
    if checks.check_flag("lr_in_momentum", lr_in_momentum):
        return chain(rms, scale, trace)
    return chain(rms, trace, scale)
