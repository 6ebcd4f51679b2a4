# SPDX-License-Identifier: Apache-2.0
"""RMSProp of PyTorch, timm, stable-baselines3 and pfrl."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms._numerics import widen
from optax_rms._schedules import as_schedule, check_learning_rate
from optax_rms._types import LearningRate, Number, PyTree


class RealAndImaginary(NamedTuple):
    """A complex leaf as PyTorch's RMSprop updates it: as two real arrays."""

    real: Any
    imaginary: Any


def split(tree: PyTree) -> PyTree:
    """Replace complex leaves by pairs."""

    def pair(x):
        if not jnp.iscomplexobj(x):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            real = jnp.finfo(x.dtype).dtype
            part = jax.ShapeDtypeStruct(x.shape, real, sharding=x.sharding)
            return RealAndImaginary(part, part)
        return RealAndImaginary(jnp.real(x), jnp.imag(x))

    return jax.tree.map(pair, tree)


def join(tree: PyTree) -> PyTree:
    """Replace pairs by complex leaves."""

    def is_pair(x):
        return isinstance(x, RealAndImaginary)

    return jax.tree.map(
        lambda x: jax.lax.complex(*x) if is_pair(x) else x, tree, is_leaf=is_pair
    )


def rmsprop(
    lr: LearningRate = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    capturable: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""``torch.optim.RMSprop``.

    The updates are those of PyTorch, step for step, up to rounding:

    .. math::
      g_t &\leftarrow \pm g_t + \text{weight_decay} \, \theta_{t-1} \\
      v_t &= \text{alpha} \, v_{t-1} + (1 - \text{alpha}) \, g_t^2 \\
      b_t &= \text{momentum} \, b_{t-1} + g_t / (\sqrt{v_t} + \text{eps}) \\
      \theta_t &= \theta_{t-1} - \text{lr}_t \, b_t

    from :math:`v_0 = b_0 = 0`, with minus for ``maximize``. With ``centered``, the
    variance :math:`v_t - m_t^2` takes the place of :math:`v_t` under the root, where
    :math:`m_t` is the moving average of :math:`g_t`.

    Two faults of PyTorch are not reproduced. Centered, PyTorch computes the variance as
    a difference of two nearly equal numbers. Rounding makes the difference negative and
    its root NaN, for example after a hundred nearly equal gradients; here the variance
    cannot be negative. PyTorch keeps averages in the dtype of the parameters. In half
    precision they stop changing, and in float16 0 / 0 gives NaN; here averages are at
    least float32.

    A gradient of ``None`` changes neither its parameter nor the state, as in PyTorch.
    The real and imaginary part of a complex parameter have averages of their own. The
    gradient of a complex parameter that ``jax.grad`` returns is the conjugate of
    PyTorch's gradient: apply ``jnp.conj`` first, as for every Optax optimizer.

    Args:
      lr: the learning rate: a number of at least 0, a scalar array, or a schedule,
        which is a function from the number of steps before this one to the rate.
      alpha: weight of the past in the moving averages, in [0, 1].
      eps: added to the root, at least 0.
      weight_decay: factor of the parameters that are added to the gradients, at least
        0. Unless ``weight_decay`` is the number 0, ``update`` needs the parameters.
      momentum: weight of the past in the momentum, in [0, 1]; the number 0 for none.
      centered: whether to divide by the standard deviation of the gradient.
      maximize: whether to negate the gradients, so that the loss grows.
      capturable: must be ``False``; use ``jax.jit``.
      foreach: must be ``None``; use ``jax.jit``, which compiles all parameters into one
        program.
      differentiable: must be ``False``; every step here is differentiable.

    Returns:
      A gradient transformation. Its state is that of ``optax_rms.rmsprop`` with a
      schedule as learning rate, which counts the steps as PyTorch does:
      ``ScaleByRmsState`` (or ``ScaleByStddevState``), ``TraceState`` (or
      ``EmptyState``), ``ScaleByScheduleState``. Complex leaves are replaced by pairs.

    Raises:
      ValueError: a number is out of range, an option has no meaning here, or ``update``
        lacks the parameters.
      TypeError: an argument is no number or flag; a gradient is neither floating-point
        nor complex.

    Example:
      At the default ``alpha`` the first step is ten times the learning rate:

      >>> import jax.numpy as jnp
      >>> from optax_rms import dialects
      >>> tx = dialects.torch.rmsprop(lr=0.01)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(jnp.array([5.0, -1e-3]), tx.init(params), params)
      >>> print([f"{update:.3f}" for update in updates])
      ['-0.100', '0.100']

    References:
      PyTorch, RMSprop,
      https://docs.pytorch.org/docs/stable/generated/torch.optim.RMSprop.html
    """
    checks.reject_options(
        capturable=(capturable, False, "Use jax.jit, which captures the whole step."),
        foreach=(foreach, None, "Use jax.jit, which compiles all parameters into one."),
        differentiable=(differentiable, False, "Every step here is differentiable."),
    )
    return _optimizer(
        _Settings(
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            maximize=checks.check_flag("maximize", maximize),
            initial_scale=0.0,
            eps_in_sqrt=False,
            lr_in_momentum=False,
        )
    )


def rmsprop_tf(
    lr: LearningRate = 1e-2,
    alpha: ArrayLike = 0.9,
    eps: ArrayLike = 1e-10,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0.0,
    centered: bool = False,
    decoupled_decay: bool = False,
    *,
    lr_in_momentum: bool = True,
    caution: bool = False,
    corrected_weight_decay: bool = False,
    max_lr_snapshot: ArrayLike | None = None,
    foreach: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""``RMSpropTF`` of timm: TensorFlow's formula on PyTorch's arguments.

    .. math::
      g_t &\leftarrow g_t + \text{weight_decay} \, \theta_{t-1}
        \quad\text{unless decoupled_decay} \\
      v_t &= \text{alpha} \, v_{t-1} + (1 - \text{alpha}) \, g_t^2 \\
      b_t &= \text{momentum} \, b_{t-1}
        + \text{lr}_t \, g_t / \sqrt{v_t + \text{eps}} \\
      \theta_t &= (1 - \text{lr}_t \, \text{weight_decay}) \, \theta_{t-1} - b_t
        \quad\text{with decoupled_decay, and}\quad \theta_{t-1} - b_t
        \quad\text{otherwise}

    from :math:`v_0 = 1` and :math:`b_0 = 0`. Without ``lr_in_momentum`` the learning
    rate is a factor of :math:`b_t` in the last line instead. With ``centered``, the
    variance :math:`v_t - m_t^2` takes the place of :math:`v_t`, where :math:`m_t` is
    the moving average of :math:`g_t`. With ``caution``, elements of :math:`b_t` whose
    sign is not that of :math:`g_t` do not move their parameters. The other elements are
    divided by their share of the array, for example by 1/2 if half of the elements
    move, and by at least 1/1000.

    timm squares complex gradients without taking their modulus. Here the real and
    imaginary part have averages of their own, as in `rmsprop`.

    Args:
      lr: the learning rate: a number of at least 0, a scalar array, or a schedule,
        which is a function from the number of steps before this one to the rate.
      alpha: weight of the past in the moving averages, in [0, 1].
      eps: added to the mean square, inside the root; at least 0.
      weight_decay: factor of the parameters in the equations; at least 0. Unless
        ``weight_decay`` is the number 0, ``update`` needs the parameters.
      momentum: weight of the past in the momentum, in [0, 1]; the number 0 for none.
      centered: whether to divide by the standard deviation of the gradient.
      decoupled_decay: whether the decay shrinks the parameters and has no part in the
        averages.
      lr_in_momentum: whether the learning rate is applied before the momentum.
      caution: whether to leave out steps against the gradient. Without momentum no step
        is against the gradient.
      corrected_weight_decay: whether the decoupled decay is
        lr^2 / max_lr_snapshot * weight_decay instead of lr * weight_decay.
      max_lr_snapshot: the highest learning rate; timm takes the rate that the optimizer
        is built with. Needed with ``corrected_weight_decay`` if ``lr`` is a schedule.
      foreach: must be ``None``; use ``jax.jit``, which compiles all parameters into one
        program.

    Returns:
      A gradient transformation. Its state is as in `rmsprop`, the last two swapped with
      ``lr_in_momentum``.

    Raises:
      ValueError: a number is out of range, an option has no meaning here, or ``update``
        lacks the parameters.
      TypeError: an argument is no number or flag; a gradient is neither floating-point
        nor complex.

    Example:
      Averages that start from 1 make the first steps for small gradients small:

      >>> import jax.numpy as jnp
      >>> from optax_rms import dialects
      >>> tx = dialects.torch.rmsprop_tf(lr=0.01)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(jnp.array([5.0, -1e-3]), tx.init(params), params)
      >>> print([f"{update:.5f}" for update in updates])
      ['-0.02712', '0.00001']

    References:
      Wightman, PyTorch Image Models,
      https://github.com/huggingface/pytorch-image-models

      Liang, Chen, Liu and Liu, 2024, Cautious Optimizers: Improving Training with One
      Line of Code, https://arxiv.org/abs/2411.16085

      Defazio, 2025, Why Gradients Rapidly Increase Near the End of Training
      (``corrected_weight_decay``), https://arxiv.org/abs/2506.02285
    """
    checks.reject_options(
        foreach=(foreach, None, "Use jax.jit, which compiles all parameters into one.")
    )
    max_lr: Any = None
    if checks.check_flag("corrected_weight_decay", corrected_weight_decay):
        if max_lr_snapshot is None and callable(lr):
            raise ValueError(
                "max_lr_snapshot must be the highest rate of the schedule lr, because "
                "of corrected_weight_decay."
            )
        max_lr = lr if max_lr_snapshot is None else max_lr_snapshot
        max_lr = checks.check_number("max_lr_snapshot", max_lr, exclude_low=True)
    return _optimizer(
        _Settings(
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            decoupled_decay=checks.check_flag("decoupled_decay", decoupled_decay),
            max_lr=max_lr,
            caution=checks.check_flag("caution", caution),
            initial_scale=1.0,
            eps_in_sqrt=True,
            lr_in_momentum=lr_in_momentum,
        )
    )


def rmsprop_tf_like(
    lr: LearningRate = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""``RMSpropTFLike`` of stable-baselines3.

    PyTorch's formula with ``eps`` inside the root and an average that starts from 1:

    .. math::
      g_t &\leftarrow g_t + \text{weight_decay} \, \theta_{t-1} \\
      v_t &= \text{alpha} \, v_{t-1} + (1 - \text{alpha}) \, g_t^2, \qquad v_0 = 1 \\
      b_t &= \text{momentum} \, b_{t-1} + g_t / \sqrt{v_t + \text{eps}},
        \qquad b_0 = 0 \\
      \theta_t &= \theta_{t-1} - \text{lr}_t \, b_t

    With ``centered``, the variance :math:`v_t - m_t^2` takes the place of :math:`v_t`,
    where :math:`m_t` is the moving average of :math:`g_t`. Despite its name the class
    applies the learning rate after the momentum, where TensorFlow applies it before.

    Args:
      lr: as for `rmsprop`.
      alpha: weight of the past in the moving averages, in [0, 1].
      eps: added to the mean square, inside the root; at least 0.
      weight_decay: as for `rmsprop`.
      momentum: weight of the past in the momentum, in [0, 1]; the number 0 for none.
      centered: whether to divide by the standard deviation of the gradient.

    Returns:
      A gradient transformation with the state of `rmsprop`.

    Raises:
      ValueError: a number is out of range, or ``update`` lacks the parameters.
      TypeError: an argument is no number or flag; a gradient is neither floating-point
        nor complex.

    Example:
      The average starts from 1, so a gradient much smaller than 1 moves its parameter
      by about ``lr`` times the gradient in the first step, and not by 10 ``lr``:

      >>> import jax.numpy as jnp
      >>> from optax_rms import dialects
      >>> tx = dialects.torch.rmsprop_tf_like(lr=0.1)
      >>> updates, state = tx.update(jnp.array(-1e-3), tx.init(jnp.array(0.0)))
      >>> print(f"{updates:.6f}")
      0.000101

    References:
      Raffin et al., 2021, Stable-Baselines3: Reliable Reinforcement Learning
      Implementations, https://github.com/DLR-RM/stable-baselines3
    """
    return _optimizer(
        _Settings(
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            initial_scale=1.0,
            eps_in_sqrt=True,
            lr_in_momentum=False,
        )
    )


def rmsprop_eps_inside_sqrt(
    lr: LearningRate = 1e-2,
    alpha: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0,
    momentum: ArrayLike = 0,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""``RMSpropEpsInsideSqrt`` of pfrl.

    PyTorch's formula with ``eps`` inside the root:

    .. math::
      g_t &\leftarrow g_t + \text{weight_decay} \, \theta_{t-1} \\
      v_t &= \text{alpha} \, v_{t-1} + (1 - \text{alpha}) \, g_t^2, \qquad v_0 = 0 \\
      b_t &= \text{momentum} \, b_{t-1} + g_t / \sqrt{v_t + \text{eps}},
        \qquad b_0 = 0 \\
      \theta_t &= \theta_{t-1} - \text{lr}_t \, b_t

    With ``centered``, the variance :math:`v_t - m_t^2` takes the place of :math:`v_t`,
    where :math:`m_t` is the moving average of :math:`g_t`.

    Args:
      lr: as for `rmsprop`.
      alpha: weight of the past in the moving averages, in [0, 1].
      eps: added to the mean square, inside the root; at least 0.
      weight_decay: as for `rmsprop`.
      momentum: weight of the past in the momentum, in [0, 1]; the number 0 for none.
      centered: whether to divide by the standard deviation of the gradient.

    Returns:
      A gradient transformation with the state of `rmsprop`.

    Raises:
      ValueError: a number is out of range, or ``update`` lacks the parameters.
      TypeError: an argument is no number or flag; a gradient is neither floating-point
        nor complex.

    Example:
      At a gradient of 1e-3 and an ``alpha`` of 0 the mean square is 1e-6, as large as
      ``eps``, so the step is shorter than ``lr`` by the root of 2:

      >>> import jax.numpy as jnp
      >>> from optax_rms import dialects
      >>> tx = dialects.torch.rmsprop_eps_inside_sqrt(lr=1.0, alpha=0.0, eps=1e-6)
      >>> updates, state = tx.update(jnp.array(-1e-3), tx.init(jnp.array(0.0)))
      >>> print(f"{updates:.4f}")
      0.7071

    References:
      Fujita, Nagarajan, Kataoka and Ishikawa, 2021, ChainerRL: A Deep Reinforcement
      Learning Library, https://github.com/pfnet/pfrl
    """
    return _optimizer(
        _Settings(
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            initial_scale=0.0,
            eps_in_sqrt=True,
            lr_in_momentum=False,
        )
    )


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of the functions above, in the order of their use.

    The first six and the flags are PyTorch's and timm's arguments. ``initial_scale``,
    ``eps_in_sqrt`` and ``lr_in_momentum`` are those of ``optax_rms.rmsprop``.
    ``max_lr`` is the highest learning rate, if the decay is corrected, or ``None``.
    """

    lr: LearningRate
    alpha: ArrayLike
    eps: ArrayLike
    weight_decay: ArrayLike
    momentum: ArrayLike
    centered: bool
    initial_scale: float
    eps_in_sqrt: bool
    lr_in_momentum: bool
    maximize: bool = False
    decoupled_decay: bool = False
    max_lr: Number | None = None
    caution: bool = False


def _optimizer(settings: _Settings) -> optax.GradientTransformationExtraArgs:
    # Always a schedule, so that the state counts the steps as PyTorch does.
    schedule = as_schedule(check_learning_rate("lr", settings.lr))
    weight_decay = checks.check_number("weight_decay", settings.weight_decay)
    momentum = checks.check_number("momentum", settings.momentum, 0, 1)
    alpha = checks.check_number("alpha", settings.alpha, 0, 1)
    has_decay = not checks.is_zero(weight_decay)
    has_momentum = not checks.is_zero(momentum)

    def inner(lr: Callable[[Any], Any]) -> optax.GradientTransformation:
        return _rmsprop.rmsprop(
            lr,
            alpha,
            settings.eps,
            settings.initial_scale,
            settings.eps_in_sqrt,
            settings.centered,
            momentum if has_momentum else None,
            lr_in_momentum=settings.lr_in_momentum,
        )

    inner_init = inner(schedule).init

    def init(params):
        return inner_init(split(params))

    def update(updates, state, params=None):
        checks.check_inexact_leaves("gradients", updates)
        if has_decay and params is None:
            raise ValueError("update needs the parameters, because of weight_decay.")
        gradients = jax.tree.map(widen, split(updates))
        if settings.maximize:
            gradients = jax.tree.map(jnp.negative, gradients)
        if has_decay and not settings.decoupled_decay:
            gradients = _add(gradients, weight_decay, split(params))
        # A decoupled decay needs the rate as well, and a schedule may be costly.
        rates: list[Any] = []

        def remembered_lr(count):
            rates.append(schedule(count))
            return rates[0]

        steps, new_state = inner(remembered_lr).update(gradients, state)
        if settings.caution and has_momentum:
            steps = jax.tree.map(_leave_out_ascents, steps, gradients)
        if has_decay and settings.decoupled_decay:
            (rate,) = rates
            factor = rate if settings.max_lr is None else rate**2 / settings.max_lr
            steps = _add(steps, -factor * weight_decay, split(params))
        return jax.tree.map(_cast_like, join(steps), updates), new_state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def _cast_like(update: jax.Array, g: ArrayLike) -> jax.Array:
    return update.astype(jnp.result_type(g))


def _add(gradients: PyTree, factor: ArrayLike, params: PyTree) -> PyTree:
    """``gradients + factor * params``, in the precision of the gradients."""

    def add(g, p):
        if g is None:
            return None
        return g + jnp.asarray(factor, g.dtype) * jnp.asarray(p).astype(g.dtype)

    return jax.tree.map(add, gradients, params, is_leaf=lambda g: g is None)


def _leave_out_ascents(step: jax.Array, g: jax.Array) -> jax.Array:
    """Set steps along the gradient to 0 and divide the others by their share."""
    descends = step * g < 0
    share = jnp.count_nonzero(descends).astype(step.dtype) / max(step.size, 1)
    return jnp.where(descends, step, 0) / jnp.maximum(share, 1e-3)
