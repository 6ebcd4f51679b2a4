# SPDX-License-Identifier: Apache-2.0
"""LaProp: a momentum of what RMSProp returns. And DreamerV3, which trains with it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms._scale_by_rms import sum_of_weights
from optax_rms._schedules import as_schedule, check_learning_rate
from optax_rms._types import LearningRate, PyTree
from optax_rms.dialects._shared import clipping


def laprop(
    learning_rate: LearningRate = 4e-4,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-15,
) -> optax.GradientTransformationExtraArgs:
    r"""LaProp: RMSProp with bias correction, then an average of its results.

    Adam averages the gradients and divides the average. LaProp divides first, by
    PyTorch's rule with epsilon outside the root, and averages the quotients:

    .. math::
      v_t &= b_2 v_{t-1} + (1 - b_2) g_t^2 \\
      m_t &= b_1 m_{t-1} + (1 - b_1) \, g_t / (\sqrt{v_t / (1 - b_2^t)} + \text{eps}) \\
      \theta_t &= \theta_{t-1} - \text{learning_rate}_t \, m_t / (1 - b_1^t)

    from :math:`v_0 = m_0 = 0`. It is ``rmsprop`` with ``momentum=b1`` and without
    ``lr_in_momentum``; the learning rate contains the factors of :math:`m_t`.

    These are the rules of the paper, of Levanter (with b2 = 0.99 and eps = 1e-30), of
    DreamerV3 and of NVIDIA's Emerging Optimizers. The authors' code and timm differ as
    soon as the learning rate changes: they keep the learning rate inside the average,
    and divide by an average of learning rates. The defaults are those of both.

    Loss: none in particular. An epsilon of 1e-15 outside the root has no effect on
    gradients above 1e-13, and the scale of the loss drops out.

    Args:
      learning_rate: a number of at least 0, a scalar array, or a schedule.
      b1: weight of the past in the average of quotients, in [0, 1).
      b2: weight of the past in the mean square, in [0, 1).
      eps: added to the root, at least 0.

    Returns:
      A gradient transformation. Its state is that of ``rmsprop`` with these options.
      The field ``trace`` is :math:`m_t / (1 - b_1)`.

    Example:
      With a short memory of squares, a single large gradient makes the later steps of
      Adam many learning rates long, and leaves those of LaProp as they are:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_rms import recipes
      >>> for tx in (recipes.laprop(0.1, b2=0.5), optax.adam(0.1, b2=0.5)):
      ...     state = tx.init(jnp.zeros(1))
      ...     for g in (100.0, *[1.0] * 12):
      ...         updates, state = tx.update(jnp.full(1, g), state)
      ...     print(updates.round(2))
      [-0.03]
      [-0.32]

    References:
      Ziyin, Wang and Ueda, 2020, LaProp: Separating Momentum and Adaptivity in Adam,
      https://arxiv.org/abs/2002.04839

      https://github.com/Z-T-WANG/LaProp-Optimizer/blob/a419916505/laprop.py

      Levanter,
      https://github.com/stanford-crfm/levanter/blob/9263f81e8b/src/levanter/optim/rmsprop.py

      NVIDIA,
      https://github.com/NVIDIA-NeMo/Emerging-Optimizers/blob/225e2f5a86/emerging_optimizers/scalar_optimizers/laprop.py
    """
    momentum = checks.check_number("b1", b1, 0, 1, exclude_high=True)
    decay = checks.check_number("b2", b2, 0, 1, exclude_high=True)
    schedule = as_schedule(check_learning_rate("learning_rate", learning_rate))

    def rates(count: Any) -> jax.Array:
        total = sum_of_weights(momentum, optax.safe_increment(count))
        return jnp.asarray(schedule(count), total.dtype) * ((1 - momentum) / total)

    return _rmsprop.rmsprop(
        rates,
        decay,
        eps,
        eps_in_sqrt=False,
        momentum=momentum,
        bias_correction=True,
        lr_in_momentum=False,
    )


def dreamer_v3(
    learning_rate: ArrayLike = 4e-5, warmup_steps: int = 1000
) -> optax.GradientTransformationExtraArgs:
    """DreamerV3: every tensor clipped to 0.3 of its weights' norm, then `laprop`.

    The gradient of every tensor is scaled down to a norm of at most 0.3 times the norm
    of the weights, for example to 0.6 if the weights have a norm of 2, but not below
    0.3 * 0.001. ``optax.adaptive_grad_clip`` is another rule, with norms of rows. Then
    comes `laprop` with b1 = 0.9, b2 = 0.999 and epsilon 1e-20, and a learning rate that
    grows linearly from 0 within 1,000 steps.

    Loss: the sum of the losses of model, policy and value, times their scales, each the
    mean over batch and time. Neither the clipping nor the division depends on the scale
    of the loss.

    Disputed: b2. The paper has 0.99, the code 0.999, here as well.

    Next to an epsilon of 1e-20 every mean square matters, however small. Where a format
    of storage rounds a mean square to 0, the next step is up to 32 learning rates long.
    With ``compress_state`` take ``optax_rms.UE8M8`` for ``nu``, which has the window of
    float32. The window of ``optax_rms.UE6M2`` begins at gradients of 1e-7, and below,
    steps are 30 times longer. The page "Reproduce a paper" has the measurement.

    Args:
      learning_rate: the rate after the warm-up.
      warmup_steps: the number of steps until the learning rate is ``learning_rate``.

    Returns:
      A gradient transformation. Its ``update`` needs the parameters. The first step is
      0, as the warm-up begins from there.

    Raises:
      ValueError: ``update`` lacks the parameters.

    Example:
      A tensor of norm 2 allows gradients of norm 0.6. The direction is kept, and the
      second step is the first that is not 0:

      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.dreamer_v3(learning_rate=0.1, warmup_steps=2)
      >>> params = jnp.array([2.0, 0.0])
      >>> state = tx.init(params)
      >>> for g in (jnp.array([0.3, 0.4]), jnp.array([300.0, 400.0])):
      ...     updates, state = tx.update(g, state, params)
      ...     print(updates.round(4))
      [-0. -0.]
      [-0.0523 -0.0523]

    References:
      Hafner et al., 2023, Mastering Diverse Domains through World Models,
      https://arxiv.org/abs/2301.04104

      ``embodied/jax/opt.py``, ``dreamerv3/configs.yaml`` and
      https://github.com/danijar/dreamerv3/blob/e3f0224869/dreamerv3/agent.py
    """
    learning_rate = checks.check_number("learning_rate", learning_rate)
    warmup_steps = checks.check_steps("warmup_steps", warmup_steps)
    rates = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.chain(optax.stateless(_clip_to_weights), laprop(rates, eps=1e-20))


def _clip_to_weights(updates: PyTree, params: PyTree | None) -> PyTree:
    """Scale every gradient down to 0.3 of the norm of its weights, at least 0.0003."""
    if params is None:
        raise ValueError(
            "update needs the parameters, to clip gradients by their norm."
        )

    def clip(g, p):
        limit = 0.3 * jnp.maximum(clipping.norm(p), 1e-3)
        return clipping.clip_by_norm(g, limit)

    return jax.tree.map(clip, updates, params, is_leaf=lambda g: g is None)
