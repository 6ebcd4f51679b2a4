# SPDX-License-Identifier: Apache-2.0
"""RMSProp as PyTorch and timm have it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms._types import LearningRate, PyTree
from optax_rms.dialects._shared import chain_state


class RealAndImaginary(NamedTuple):
    """A complex leaf as PyTorch's RMSprop sees it: as two real ones."""

    real: Any
    imaginary: Any


def split(tree: PyTree) -> PyTree:
    """Replace complex leaves by pairs."""

    def pair(x):
        if jnp.iscomplexobj(x):
            return RealAndImaginary(jnp.real(x), jnp.imag(x))
        return x

    return jax.tree.map(pair, tree)


def join(tree: PyTree) -> PyTree:
    """Replace pairs by complex leaves."""

    def is_pair(x):
        return isinstance(x, RealAndImaginary)

    return jax.tree.map(
        lambda x: jax.lax.complex(*x) if is_pair(x) else x, tree, is_leaf=is_pair
    )


def check_learning_rate(name: str, value: LearningRate) -> Any:
    """Return a learning rate: a number, an array, or a schedule."""
    return value if callable(value) else checks.check_number(name, value)


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
) -> optax.GradientTransformation:
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

    Where PyTorch is wrong, this is right: centered, PyTorch computes the variance as a
    difference of two nearly equal numbers, which rounding makes negative and the root
    NaN as soon as a gradient hardly changes for a hundred steps; here it cannot be
    negative. PyTorch keeps averages in the dtype of the parameters, where they stall in
    half precision and turn 0 / 0 to NaN in float16; here they are at least float32.

    A gradient of ``None`` leaves its parameter alone, without decay, as in PyTorch. The
    real and imaginary part of a complex parameter have averages of their own. The
    gradient of a complex parameter that ``jax.grad`` returns is the conjugate of
    PyTorch's: apply ``jnp.conj`` to it first, as for every Optax optimizer.

    Args:
      lr: the learning rate: a number of at least 0, a scalar array, or a schedule from
        the step count, starting at 0, to one.
      alpha: weight of the past in the moving averages, in [0, 1].
      eps: added to the root, at least 0.
      weight_decay: factor of the parameters that are added to the gradients, at least
        0. Unless it is the number 0, ``update`` needs the parameters.
      momentum: weight of the past in the momentum, in [0, 1]; the number 0 for none.
      centered: whether to divide by the standard deviation of the gradient.
      maximize: whether to walk uphill.
      capturable: must be ``False``; use ``jax.jit``.
      foreach: must be ``None``; use ``jax.jit``, which compiles all parameters into one
        program.
      differentiable: must be ``False``; everything here is differentiable.

    Returns:
      A gradient transformation. Its state is that of ``optax_rms.rmsprop`` with a
      schedule as learning rate, so that it counts its steps as PyTorch does:
      ``ScaleByRmsState`` (or ``ScaleByStddevState``), ``TraceState`` (or
      ``EmptyState``), ``ScaleByScheduleState``. Complex leaves are replaced by pairs.

    Raises:
      ValueError: a number is out of range, an option has no meaning here, or ``update``
        lacks the parameters.
      TypeError: an argument is no number or flag; a leaf is neither floating-point nor
        complex.

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
        lr,
        alpha,
        eps,
        weight_decay,
        momentum,
        centered,
        maximize=checks.check_flag("maximize", maximize),
        eps_in_sqrt=False,
        initial_scale=0.0,
        lr_in_momentum=False,
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
) -> optax.GradientTransformation:
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
    sign is not that of :math:`g_t` do not move their parameters, and the others move
    them by as much more as there are fewer of them in the array, at most by 1000.

    timm squares complex gradients without taking their modulus. Here the real and
    imaginary part have averages of their own, as in `rmsprop`.

    Args:
      lr: the learning rate: a number of at least 0, a scalar array, or a schedule from
        the step count, starting at 0, to one.
      alpha: weight of the past in the moving averages, in [0, 1].
      eps: added to the mean square, inside the root; at least 0.
      weight_decay: factor of the parameters in the equations; at least 0. Unless it is
        the number 0, ``update`` needs the parameters.
      momentum: weight of the past in the momentum, in [0, 1]; the number 0 for none.
      centered: whether to divide by the standard deviation of the gradient.
      decoupled_decay: whether the decay shrinks the parameters, without a part in the
        averages.
      lr_in_momentum: whether the learning rate is applied before the momentum.
      caution: whether to leave out steps against the gradient. Without momentum there
        are none.
      corrected_weight_decay: whether the decoupled decay is
        lr^2 / max_lr_snapshot * weight_decay instead of lr * weight_decay.
      max_lr_snapshot: the highest learning rate, where timm takes the one that the
        optimizer is built with; needed with ``corrected_weight_decay`` if ``lr`` is a
        schedule.
      foreach: must be ``None``; use ``jax.jit``, which compiles all parameters into one
        program.

    Returns:
      A gradient transformation. Its state is as in `rmsprop`, the last two swapped with
      ``lr_in_momentum``.

    Raises:
      ValueError: a number is out of range, an option has no meaning here, or ``update``
        lacks the parameters.
      TypeError: an argument is no number or flag; a leaf is neither floating-point nor
        complex.

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
        lr,
        alpha,
        eps,
        weight_decay,
        momentum,
        centered,
        decoupled_decay=checks.check_flag("decoupled_decay", decoupled_decay),
        max_lr=max_lr,
        caution=checks.check_flag("caution", caution),
        eps_in_sqrt=True,
        initial_scale=1.0,
        lr_in_momentum=lr_in_momentum,
    )


def _optimizer(
    lr,
    alpha,
    eps,
    weight_decay,
    momentum,
    centered,
    *,
    maximize=False,
    decoupled_decay=False,
    max_lr=None,
    caution=False,
    eps_in_sqrt,
    initial_scale,
    lr_in_momentum,
) -> optax.GradientTransformation:
    lr = check_learning_rate("lr", lr)
    weight_decay = checks.check_number("weight_decay", weight_decay)
    momentum = checks.check_number("momentum", momentum, 0, 1)
    has_decay = not _is_zero(weight_decay)
    # Always a schedule, so that the state counts the steps as PyTorch does.
    schedule: Any = lr if callable(lr) else lambda count: lr
    inner = _rmsprop.rmsprop(
        schedule,
        checks.check_number("alpha", alpha, 0, 1),
        eps,
        initial_scale,
        eps_in_sqrt,
        centered,
        None if _is_zero(momentum) else momentum,
        lr_in_momentum=lr_in_momentum,
    )

    def init(params):
        return inner.init(split(params))

    def update(updates, state, params=None):
        checks.check_inexact_leaves("gradients", updates)
        gradients = jax.tree.map(_widen, split(updates))
        if maximize:
            gradients = jax.tree.map(jnp.negative, gradients)
        if has_decay and params is None:
            raise ValueError("update needs the parameters, because of weight_decay.")
        if has_decay and not decoupled_decay:
            gradients = _add(gradients, weight_decay, split(params))
        steps, new_state = inner.update(gradients, state)
        if caution and not _is_zero(momentum):
            steps = jax.tree.map(_leave_out_ascents, steps, gradients)
        if has_decay and decoupled_decay:
            rate = schedule(chain_state.fields(state)["count"])
            rate = rate if max_lr is None else rate**2 / max_lr
            steps = _add(steps, -rate * weight_decay, split(params))
        steps = jax.tree.map(_like, join(steps), updates)
        return steps, new_state

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))


def _is_zero(number: checks.Number) -> bool:
    """Whether a number is known to be 0; a traced one is not."""
    return isinstance(number, float) and number == 0


def _widen(g):
    g = jnp.asarray(g)
    return g.astype(jnp.float32) if jnp.finfo(g.dtype).bits < 32 else g


def _like(update, g):
    return update.astype(jnp.result_type(g))


def _add(gradients, factor, params):
    """``gradients + factor * params``, in the precision of the gradients."""

    def add(g, p):
        if g is None:
            return None
        return g + jnp.asarray(factor, g.dtype) * jnp.asarray(p).astype(g.dtype)

    return jax.tree.map(add, gradients, params, is_leaf=lambda g: g is None)


def _leave_out_ascents(step, g):
    """The steps that go down; in exchange for the others, they are larger."""
    descends = step * g < 0
    share = jnp.count_nonzero(descends).astype(step.dtype) / max(step.size, 1)
    return jnp.where(descends, step, 0) / jnp.maximum(share, 1e-3)
