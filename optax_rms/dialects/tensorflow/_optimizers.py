# SPDX-License-Identifier: Apache-2.0
"""RMSProp of TensorFlow 1, and of tf.keras before TensorFlow 2.11."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms._schedules import as_schedule, check_learning_rate
from optax_rms._types import LearningRate, PyTree, Schedule
from optax_rms.dialects._shared import clipping

_NAME_HINT = "Names in a checkpoint are arguments of import_state and export_state."


def rmsprop(
    learning_rate: LearningRate,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    *,
    centered: bool = False,
    use_locking: bool = False,
    name: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``tf.compat.v1.train.RMSPropOptimizer``.

    The updates are those of TensorFlow, step for step, up to rounding:

    .. math::
      v_t &= v_{t-1} + (1 - \text{decay}) \, (g_t^2 - v_{t-1}) \\
      b_t &= \text{momentum} \, b_{t-1}
        + \text{learning_rate}_t \, g_t / \sqrt{v_t + \text{epsilon}} \\
      \theta_t &= \theta_{t-1} - b_t

    from :math:`v_0 = 1` and :math:`b_0 = 0`. The start at 1 acts as a warm-up: in
    the first steps, gradients much smaller than 1 move their parameters less. With
    ``centered``, the variance :math:`v_t - m_t^2` takes the place of :math:`v_t` under
    the root, where :math:`m_t` is the moving average of :math:`g_t`.

    Two differences: rows that a sparse gradient does not touch are gradients of 0
    here, while TensorFlow keeps their parameters and averages as they are. Of complex
    gradients :math:`|g_t|^2` is averaged, not the complex :math:`g_t^2`.

    Args:
      learning_rate: a number of at least 0, a scalar array, or a schedule from the step
        count, starting at 0, to one.
      decay: weight of the past in the moving averages, in [0, 1].
      momentum: weight of the past in the momentum, in [0, 1]; the number 0 for none,
        which keeps no buffer.
      epsilon: added to the mean square, at least 0.
      centered: whether to divide by the standard deviation of the gradient.
      use_locking: must be ``False``; nothing is updated in place.
      name: must be ``None``; give the name in a checkpoint to `import_state`.

    Returns:
      A gradient transformation with the state of ``optax_rms.rmsprop``.

    Raises:
      ValueError: a number is out of range, or an option has no meaning here.
      TypeError: an argument is no number or flag; a leaf is neither floating-point nor
        complex.

    Example:
      A small gradient moves its parameter by about learning_rate * gradient at first,
      not by a multiple of the learning rate:

      >>> import jax.numpy as jnp
      >>> from optax_rms import dialects
      >>> tx = dialects.tensorflow.rmsprop(0.1)
      >>> params = jnp.array([0.0, 0.0])
      >>> updates, state = tx.update(jnp.array([1.0, 1e-3]), tx.init(params))
      >>> print(updates.round(6))
      [-0.1      -0.000105]

    References:
      TensorFlow, tf.compat.v1.train.RMSPropOptimizer,
      https://www.tensorflow.org/api_docs/python/tf/compat/v1/train/RMSPropOptimizer
    """
    checks.reject_options(
        use_locking=(use_locking, False, "Nothing is updated in place."),
        name=(name, None, _NAME_HINT),
    )
    momentum = checks.check_number("momentum", momentum, 0, 1)
    return _rmsprop.rmsprop(
        learning_rate,
        decay,
        checks.check_number("epsilon", epsilon),
        initial_scale=1.0,
        centered=centered,
        momentum=None if checks.is_zero(momentum) else momentum,
    )


def legacy_keras_rmsprop(
    learning_rate: LearningRate = 0.001,
    rho: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike | None = 1e-7,
    centered: bool = False,
    name: None = None,
    *,
    clipnorm: ArrayLike | None = None,
    clipvalue: ArrayLike | None = None,
    global_clipnorm: ArrayLike | None = None,
    decay: ArrayLike = 0.0,
    lr: None = None,
    gradient_aggregator: None = None,
    gradient_transformers: None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``tf.keras.optimizers.RMSprop`` before TensorFlow 2.11.

    Later ``tf.keras.optimizers.legacy.RMSprop``. The updates are those of TensorFlow,
    step for step, up to rounding. The place of epsilon depends on the momentum: with
    the number 0 for ``momentum``,

    .. math::
      v_t &= \text{rho} \, v_{t-1} + (1 - \text{rho}) \, g_t^2, \qquad v_0 = 0 \\
      \theta_t &= \theta_{t-1}
        - \text{learning_rate}_t \, g_t / (\sqrt{v_t} + \text{epsilon})

    and with momentum, or an array as ``momentum`` even if its value is 0 (which
    ``optax.inject_hyperparams`` makes of it, unless it is named in ``static_args``),

    .. math::
      b_t &= \text{momentum} \, b_{t-1}
        + \text{learning_rate}_t \, g_t / \sqrt{v_t + \text{epsilon}}, \qquad b_0 = 0 \\
      \theta_t &= \theta_{t-1} - b_t

    With ``centered``, the variance :math:`v_t - m_t^2` takes the place of :math:`v_t`,
    where :math:`m_t` is the moving average of :math:`g_t`. Before all that, gradients
    are clipped: by ``clipvalue`` first, then by norm.

    The variance is never negative here. Centered and without momentum, TensorFlow forms
    the variance as a difference that rounding makes negative, and the root NaN, as soon
    as a gradient hardly changes for a hundred steps. Sparse
    gradients and complex ones differ as in `rmsprop`. Very early versions of TensorFlow
    2 had epsilon inside the root always: use ``optax_rms.rmsprop`` for those, and for
    newer versions of tf.keras the Keras dialect.

    Args:
      learning_rate: a number of at least 0, a scalar array, or a schedule from the step
        count, starting at 0, to one.
      rho: weight of the past in the moving averages, in [0, 1].
      momentum: weight of the past in the momentum, in [0, 1].
      epsilon: added to the root or to the mean square, see above. The number 0 and
        ``None`` mean 1e-7, as in TensorFlow.
      centered: whether to divide by the standard deviation of the gradient.
      name: must be ``None``; give the name in a checkpoint to `import_state`.
      clipnorm: greatest Euclidean norm of the gradient of each parameter, above 0.
      clipvalue: greatest absolute value of each element of a gradient, above 0.
      global_clipnorm: greatest Euclidean norm of all gradients together, above 0; not
        together with ``clipnorm``. If it is not finite, all gradients become NaN.
      decay: at least 0; the learning rate is divided by 1 + decay * count.
      lr: must be ``None``; use ``learning_rate``.
      gradient_aggregator: must be ``None``; average the gradients instead.
      gradient_transformers: must be ``None``; use ``optax.chain``.

    Returns:
      A gradient transformation with the state of ``optax_rms.rmsprop``.

    Raises:
      ValueError: a number is out of range, or an option has no meaning here.
      TypeError: an argument is no number or flag; a leaf is neither floating-point nor
        complex.

    Example:
      Without momentum, epsilon is outside the root, and a gradient as small as epsilon
      is still divided by little more than its own size:

      >>> import jax.numpy as jnp
      >>> from optax_rms import dialects
      >>> params, gradient = jnp.array(0.0), jnp.array(1e-5)
      >>> for momentum in (0.0, 0.5):
      ...     tx = dialects.tensorflow.legacy_keras_rmsprop(0.1, momentum=momentum)
      ...     updates, state = tx.update(gradient, tx.init(params))
      ...     print(updates.round(3))
      -0.307
      -0.003

    References:
      TensorFlow, tf.keras.optimizers.legacy.RMSprop,
      https://www.tensorflow.org/versions/r2.15/api_docs/python/tf/keras/optimizers/legacy/RMSprop
    """
    hint = "Put an Optax transformation before this one, with optax.chain."
    checks.reject_options(
        name=(name, None, _NAME_HINT),
        lr=(lr, None, "It was another name of learning_rate."),
        gradient_aggregator=(
            gradient_aggregator,
            None,
            "Average the gradients, for instance with jax.lax.pmean.",
        ),
        gradient_transformers=(gradient_transformers, None, hint),
    )
    momentum = checks.check_number("momentum", momentum, 0, 1)
    epsilon = checks.check_number("epsilon", 0.0 if epsilon is None else epsilon)
    decay = checks.check_number("decay", decay)
    if not checks.is_zero(decay):
        learning_rate = _inverse_time_decay(learning_rate, decay)
    tx = _rmsprop.rmsprop(
        learning_rate,
        checks.check_number("rho", rho, 0, 1),
        1e-7 if checks.is_zero(epsilon) else epsilon,
        eps_in_sqrt=not checks.is_zero(momentum),
        centered=centered,
        momentum=None if checks.is_zero(momentum) else momentum,
    )
    clip = _clipping(clipvalue, clipnorm, global_clipnorm)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        return tx.update(clip(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _inverse_time_decay(learning_rate: LearningRate, decay: ArrayLike) -> Schedule:
    """The schedule learning_rate / (1 + decay * count)."""
    rate = as_schedule(check_learning_rate("learning_rate", learning_rate))

    def schedule(count: ArrayLike) -> ArrayLike:
        dtype = jnp.result_type(float)
        divisor = 1 + jnp.asarray(decay, dtype) * jnp.asarray(count, dtype)
        return jnp.asarray(rate(count), dtype) / divisor

    return schedule


def _clipping(
    clipvalue: ArrayLike | None,
    clipnorm: ArrayLike | None,
    global_clipnorm: ArrayLike | None,
) -> Callable[[PyTree], PyTree]:
    """A function that clips gradients, by value and then by norm."""
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError(
            "clipnorm and global_clipnorm cannot be given together, got "
            f"{clipnorm!r} and {global_clipnorm!r}."
        )
    steps = [
        (function, checks.check_number(name, limit, exclude_low=True))
        for function, name, limit in [
            (clipping.clip_by_value, "clipvalue", clipvalue),
            (clipping.clip_by_norm, "clipnorm", clipnorm),
            (clipping.clip_by_global_norm, "global_clipnorm", global_clipnorm),
        ]
        if limit is not None
    ]

    def clip(gradients: PyTree) -> PyTree:
        for function, limit in steps:
            gradients = function(gradients, limit)
        return gradients

    return clip
