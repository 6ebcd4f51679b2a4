# SPDX-License-Identifier: Apache-2.0
"""The transformation: all the mathematics of RMSProp."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_rms import _checks as checks
from optax_rms._leafwise import Step, accumulator, single
from optax_rms._numerics import cast, zero_at_zero
from optax_rms._types import Number


class ScaleByStddevState(NamedTuple):
    """State of ``scale_by_rms(centered=True)``.

    Attributes:
      count: number of steps taken, int32 scalar; ``None`` without bias correction.
      mu: mean of the gradients, bias-corrected if there is a ``count``.
      variance: mean squared distance of the gradients from their mean. The name ``nu``
        is Optax's for the mean square, ``variance + |mu|^2``.
    """

    count: jax.Array | None  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    variance: Any


# Optax does not export this class, and a checkpoint restores only into the same one.
ScaleByRmsWithCountState: Any = type(
    jax.eval_shape(optax.scale_by_rms(bias_correction=True).init, ())
)


class _Coefficients(NamedTuple):
    """The scalars of a step.

    Attributes:
      complement: 1 - decay, the weight of the new gradient.
      total: 1 - decay^t, the sum of the weights of all gradients, or, without bias
        correction, ``None`` for 1.
      previous_total: the same before this step.
    """

    decay: Any
    complement: Any
    eps: Any
    total: Any
    previous_total: Any


def _retained(decay, x):
    return decay * x


def _retained_or_forgotten(decay, x):
    """A decay of 0 forgets all: 0 times an overflown mean square would be NaN."""
    return jnp.where(decay == 0, 0, decay * x)


def _mean_square(g, c: _Coefficients, retain, nu):
    """Hinton's moving average of the squared gradient."""
    if jnp.iscomplexobj(nu):  # as Optax keeps the mean square of a complex leaf
        nu = jnp.real(nu)
    nu = retain(c.decay, nu) + c.complement * _abs_square(g)
    return nu if c.total is None else nu / c.total, nu


def _variance(g, c: _Coefficients, retain, mu, variance):
    """The moving variance as a sum of squares, which rounding cannot make negative.

    In exact arithmetic the result is ``E[g^2] - E[g]^2``, which in float32 is the
    difference of two nearly equal numbers (West, 1979, in terms of the new mean).
    """
    gain, retained = c.complement, c.decay
    if c.total is not None:
        gain, retained = gain / c.total, retained * c.previous_total / c.total
    mu = mu + cast(gain, g.dtype) * (g - mu)
    # The distance from the new mean, g - mu, is `retained` times the distance from the
    # old one. The formula with the old mean has no division, but XLA on the CPU would
    # copy the old mean to keep it beside the new one.
    # At a decay near 0, `retained` is less than a rounding error of mu, and g - mu is a
    # rounding error alone: the spread is 0 then.
    negligible = retained < jnp.finfo(retained.dtype).eps
    spread = c.complement / jnp.where(negligible, 1, retained)
    # 0 before the square, which may overflow: 0 times infinity is NaN. A factor for all
    # elements, as XLA of JAX 0.6 rounds a selection by element differently in shards.
    kept = cast(jnp.where(negligible, 0, 1), g.dtype)
    variance = retain(c.decay, variance) + spread * _abs_square(kept * (g - mu))
    return variance if c.total is None else variance / c.total, mu, variance


def _divide_eps_in_sqrt(g, x, eps, guard):
    return g * cast(guard(jax.lax.rsqrt)(x + eps), g.dtype)


def _divide_eps_outside(g, x, eps, guard):
    root = zero_at_zero(jnp.sqrt)(x)
    return g * cast(guard(jnp.reciprocal)(root + eps), g.dtype)


def _unguarded(function):
    return function


def _abs_square(x):
    if jnp.iscomplexobj(x):
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jax.lax.square(x)  # `jnp.square` would be traced for each shape


@functools.cache
def _leaf(
    centered: bool, eps_in_sqrt: bool, eps_may_be_zero: bool, decay_may_be_zero: bool
):
    """The arithmetic on one leaf; one function per variant, as `Step` requires."""
    moment = _variance if centered else _mean_square
    divide = _divide_eps_in_sqrt if eps_in_sqrt else _divide_eps_outside
    guard = zero_at_zero if eps_may_be_zero else _unguarded
    retain = _retained_or_forgotten if decay_may_be_zero else _retained

    def leaf(g, c, *moments):
        x, *moments = moment(g, c, retain, *moments)
        return divide(g, x, c.eps, guard), *moments

    return leaf


def sum_of_weights(decay: Number, steps: Any) -> jax.Array:
    """1 - decay^steps, to full precision also where decay is close to 1."""
    dtype = jnp.result_type(float)
    if isinstance(decay, jax.Array):
        log_decay = jnp.log(decay.astype(dtype))
    else:
        log_decay = math.log(decay) if decay else -math.inf
    # At least 1 step: 0 steps times the logarithm of a decay of 0, -inf, would be NaN.
    total = -jnp.expm1(jnp.maximum(steps, 1).astype(dtype) * log_decay)
    return jnp.where(steps == 0, 0, total)


def rms_step(
    *,
    decay: ArrayLike,
    eps: ArrayLike,
    initial_scale: ArrayLike,
    eps_in_sqrt: bool,
    bias_correction: bool,
    centered: bool,
    accumulator_dtype: DTypeLike | None,
) -> Step:
    """The step behind `scale_by_rms`, whose arguments these are."""
    bias_correction = checks.check_flag("bias_correction", bias_correction)
    centered = checks.check_flag("centered", centered)
    eps_in_sqrt = checks.check_flag("eps_in_sqrt", eps_in_sqrt)
    decay = checks.check_number("decay", decay, 0, 1, exclude_high=bias_correction)
    eps = checks.check_number("eps", eps)
    initial_scale = checks.check_number("initial_scale", initial_scale)
    dtype = checks.check_accumulator_dtype("accumulator_dtype", accumulator_dtype)

    means = functools.partial(accumulator, dtype=dtype)
    squares = functools.partial(means, fill=initial_scale, real=True)
    if centered:
        state_class, fields = ScaleByStddevState, {"mu": means, "variance": squares}
    elif bias_correction:
        state_class, fields = ScaleByRmsWithCountState, {"nu": squares}
    else:
        state_class, fields = optax.ScaleByRmsState, {"nu": squares}

    def coefficients(count):
        total = previous_total = None
        if bias_correction:
            previous_total = sum_of_weights(decay, count)
            total = sum_of_weights(decay, optax.safe_increment(count))
        return _Coefficients(decay, 1 - decay, eps, total, previous_total)

    # Most often it is known that these are not 0, and a guard would take a few percent.
    eps_may_be_zero, decay_may_be_zero = (
        isinstance(x, jax.Array) or x < jnp.finfo(jnp.float32).tiny
        for x in (eps, decay)
    )
    leaf = _leaf(centered, eps_in_sqrt, eps_may_be_zero, decay_may_be_zero)
    return Step(state_class, leaf, coefficients, fields, counts=bias_correction)


def scale_by_rms(
    decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Divide by the root of the moving mean square, or of the moving variance.

    RMSProp without a learning rate: a preconditioner that gives every parameter steps
    of about the same size, for gradients of every scale. A drop-in for
    ``optax.scale_by_rms`` and, with ``centered``, for ``optax.scale_by_stddev``; see
    `rmsprop` for the whole optimizer.

    With gradient :math:`g_t` and :math:`\nu_0 =` ``initial_scale``,

    .. math::
      \nu_t &= \text{decay} \, \nu_{t-1} + (1 - \text{decay}) \, |g_t|^2 \\
      u_t &= g_t / \sqrt{\nu_t + \text{eps}}
        \quad\text{or, if not eps_in_sqrt,}\quad g_t / (\sqrt{\nu_t} + \text{eps})

    With ``centered``, the variance :math:`s_t` takes the place of :math:`\nu_t`:

    .. math::
      d_t &= g_t - \mu_{t-1}, \qquad \mu_t = \mu_{t-1} + (1 - \text{decay}) \, d_t \\
      s_t &= \text{decay} \, (s_{t-1} + (1 - \text{decay}) \, |d_t|^2)

    The variance equals :math:`\nu_t - |\mu_t|^2` in exact arithmetic. As a sum of
    squares, it cannot become negative by rounding, and the root cannot become NaN. With
    ``bias_correction``, :math:`\nu_t` and the mean are divided by the sum of their
    weights, :math:`1 - \text{decay}^t`.

    The arithmetic is in float32, or float64 for float64 leaves; the update has the
    dtype of the gradient. Where the denominator is exactly 0, because ``eps`` is 0 and
    the square of every gradient so far was 0, the update and the derivative of the
    update are 0.

    The update with ``centered`` is at most :math:`|g_t| / \sqrt{\text{eps}}`, and comes
    close to that where the gradient hardly changes. With ``bias_correction`` as well,
    the first update has this length, because a single gradient has no variance. Choose
    ``eps`` accordingly, for example 1e-4 to 1e-2, or an ``initial_scale``.

    Args:
      decay: weight of the past in the moving averages; a number or scalar array in
        [0, 1], or [0, 1) with ``bias_correction``. A decay of 0 with an ``eps`` of 0
        gives the sign of g, for example 1.0 for a gradient of 1e-3, wherever float32
        has a number for the square of g.
      eps: added to the mean square inside the root, in the unit of ``|g|^2``, or to the
        root, in the unit of ``|g|``; at least 0.
      initial_scale: start of :math:`\nu` (of :math:`s`, if ``centered``); at least 0.
        TensorFlow 1 starts from 1.
      eps_in_sqrt: whether ``eps`` is added inside the root, as in TensorFlow, or
        outside, as in PyTorch.
      bias_correction: whether to divide the averages by the sum of their weights.
      centered: whether to divide by the standard deviation instead.
      accumulator_dtype: dtype of the stored averages, a real floating dtype; ``None``
        is float32, or float64 for float64 leaves. Means of complex leaves are complex.

    Returns:
      A gradient transformation. The state is ``optax.ScaleByRmsState`` (field ``nu``),
      with ``bias_correction`` Optax's class for that case (``count``, ``nu``), or, with
      ``centered``, `ScaleByStddevState` (``count``, ``mu``, ``variance``). A leaf of an
      integer or boolean dtype has ``None`` in these fields.

    Raises:
      ValueError: a number is out of range; in ``update``, a gradient has another shape
        than its parameter.
      TypeError: an argument is no number or flag, is a float16, or is a ``decay`` in
        half precision; in ``init``, a leaf is no array; in ``update``, a gradient is
        neither floating-point nor complex, or the state is that of other options.

    Example:
      A gradient of 1e-3 and one of 1e3 move their parameters alike, by
      1 / sqrt(1 - decay) at the first step:

      >>> import jax.numpy as jnp
      >>> import optax_rms
      >>> gradients = jnp.array([1e-3, 1e3])
      >>> tx = optax_rms.scale_by_rms(decay=0.75, eps=0.0)
      >>> updates, state = tx.update(gradients, tx.init(gradients))
      >>> print(updates)
      [2. 2.]

      Constant gradients have no variance. In float32 the difference
      E[g^2] - E[g]^2 is negative for many of them, and the sum of squares never:

      >>> import jax
      >>> import optax
      >>> gradients = jnp.linspace(0.1, 1000.0, 1000)
      >>> def last_update(tx):
      ...     step = lambda state, _: tx.update(gradients, state)[::-1]
      ...     return jax.lax.scan(step, tx.init(gradients), length=100)[1][-1]
      >>> optax_update = last_update(optax.scale_by_stddev(bias_correction=True))
      >>> print(jnp.isnan(optax_update).any())
      True
      >>> tx = optax_rms.scale_by_rms(centered=True, bias_correction=True)
      >>> print(jnp.isfinite(last_update(tx)).all())
      True

    References:
      Hinton, Srivastava and Swersky, 2012, Neural Networks for Machine Learning,
      lecture 6e, slide 29,
      https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf

      Graves, 2013, Generating Sequences With Recurrent Neural Networks, eq. 38-45
      (centered, with momentum), https://arxiv.org/abs/1308.0850

      West, 1979, Updating mean and variance estimates: an improved method,
      Communications of the ACM 22(9), https://doi.org/10.1145/359146.359153
    """
    return single(
        rms_step(
            decay=decay,
            eps=eps,
            initial_scale=initial_scale,
            eps_in_sqrt=eps_in_sqrt,
            bias_correction=bias_correction,
            centered=centered,
            accumulator_dtype=accumulator_dtype,
        )
    )
