# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: DQN, A3C, A2C and IMPALA."""

import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms._types import LearningRate
from optax_rms.dialects import tensorflow, torch
from optax_rms.recipes._schedules import linear_to_zero


def dqn(learning_rate: ArrayLike = 2.5e-4) -> optax.GradientTransformation:
    """Deep Q-network on Atari, as in Nature.

    Centered, with a decay of 0.95, epsilon 0.01 inside the root, averages from 0 and no
    momentum: ``qLearnMinibatch`` in DeepMind's Lua code. pfrl's reproduction agrees.

    Loss: the sum over the batch of half the squared temporal difference, which is
    clipped to [-1, 1], with 32 samples per batch. With a mean, gradients are 32 times
    smaller next to the same epsilon, and steps up to 32 times shorter: multiply a mean
    by the batch size, or take `dqn_zoo`.

    Disputed: the "gradient momentum 0.95" of the paper. In DeepMind's code 0.95 is the
    decay of the mean gradient, and there is no momentum; an author at DeepMind confirms
    this in issue 5 of the repository. The paper's "min squared gradient 0.01" is the
    epsilon. `dqn_dopamine` and `dqn_minatar` have other epsilons and other dialects.

    Args:
      learning_rate: a number or scalar array.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.dqn()
      >>> updates, _ = tx.update(jnp.array([0.1, 10.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(6))
      [-0.000244 -0.001146]

    References:
      Mnih et al., 2015, Human-level control through deep reinforcement learning,
      Extended Data Table 1, https://doi.org/10.1038/nature14236

      DeepMind,
      https://github.com/google-deepmind/dqn/blob/9d9b1d13a2/dqn/NeuralQLearner.lua

      pfrl,
      https://github.com/pfnet/pfrl/blob/c8cb332889/examples/atari/reproduction/dqn/train_dqn.py
    """
    return _rmsprop.rmsprop(learning_rate, decay=0.95, eps=0.01, centered=True)


def dqn_zoo(
    learning_rate: ArrayLike = 2.5e-4, batch_size: int = 32
) -> optax.GradientTransformation:
    """DQN of DeepMind's DQN Zoo: `dqn` for a loss that is a mean over the batch.

    Optax's centered RMSProp with a decay of 0.95, averages from 0 and epsilon
    0.01 / batch_size^2 inside the root. Double DQN and prioritized replay of the DQN
    Zoo have optimizers of the same form.

    Loss: the mean over the batch of half the squared temporal difference. The gradient
    of the mean is clipped to [-1/32, 1/32] per sample, which is a temporal difference
    clipped to [-1, 1]. Gradients are ``batch_size`` times smaller than those of the
    sum, and so is the root of this epsilon: the steps are exactly those of `dqn`.

    Args:
      learning_rate: a number or scalar array.
      batch_size: the number of samples of which the loss is the mean.

    Returns:
      A gradient transformation.

    Example:
      The gradient of a sum with `dqn`, and that of a mean over 32 samples:

      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> g = jnp.array([0.1, 10.0])
      >>> for tx, gradient in [(recipes.dqn(), g), (recipes.dqn_zoo(), g / 32)]:
      ...     print(tx.update(gradient, tx.init(g))[0].round(6))
      [-0.000244 -0.001146]
      [-0.000244 -0.001146]

    References:
      DeepMind, ``agent.py`` and
      https://github.com/google-deepmind/dqn_zoo/blob/45061f4bbb/dqn_zoo/dqn/run_atari.py
    """
    batch_size = checks.check_steps("batch_size", batch_size)
    return _rmsprop.rmsprop(
        learning_rate, decay=0.95, eps=0.01 / batch_size**2, centered=True
    )


def dqn_dopamine(learning_rate: ArrayLike = 2.5e-4) -> optax.GradientTransformation:
    """DQN of Dopamine, the TensorFlow agent.

    TensorFlow 1's centered RMSProp, where the mean square starts from 1, with a decay
    of 0.95, epsilon 1e-5 inside the root and no momentum: ``dqn_nature.gin``.

    Loss: the mean over the batch of 32 of the Huber loss, that is, of half the squared
    temporal difference up to 1. The epsilon for this mean, 0.01 / 32^2, is 9.8e-6.

    Disputed: the start from 1, which needs 224 steps to decay to epsilon, 1e-5. Until
    then the steps of smaller gradients are shorter. In Dopamine's JAX agent, averages
    start from 0, as in `dqn_zoo`: the argument ``beta2`` of ``create_optimizer`` is the
    decay of ``optax.rmsprop``. The configurations for Atari choose Adam instead.

    Args:
      learning_rate: a number or scalar array.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.dqn_dopamine()
      >>> updates, _ = tx.update(jnp.array([0.1, 10.0]), tx.init(jnp.zeros(2)))
      >>> print([f"{update / 2.5e-4:.3f}" for update in updates])
      ['-0.103', '-4.189']

    References:
      Castro et al., 2018, Dopamine: A Research Framework for Deep Reinforcement
      Learning, https://arxiv.org/abs/1812.06110

      Dopamine, ``dqn_agent.py`` and
      https://github.com/google/dopamine/blob/5873f5494e/dopamine/tf/agents/dqn/configs/dqn_nature.gin
    """
    return tensorflow.rmsprop(learning_rate, decay=0.95, epsilon=1e-5, centered=True)


def dqn_minatar(learning_rate: ArrayLike = 2.5e-4) -> optax.GradientTransformation:
    """DQN of MinAtar.

    PyTorch's centered RMSProp with a decay of 0.95, epsilon 0.01 outside the root,
    averages from 0 and no momentum.

    Loss: the mean over the batch of 32 of the Huber loss, that is, of half the squared
    temporal difference up to 1.

    Disputed: the numbers are those of the Nature paper, and the optimizer is another
    one. An epsilon of 0.01 outside the root, next to a mean, acts as 0.32 outside the
    root next to a sum; that of `dqn` acts as 0.1.

    Args:
      learning_rate: a number or scalar array.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.dqn_minatar()
      >>> updates, _ = tx.update(jnp.array([0.1, 10.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(6))
      [-0.000786 -0.001142]

    References:
      Young and Tian, 2019, MinAtar: An Atari-Inspired Testbed for Thorough and
      Reproducible Reinforcement Learning Experiments, https://arxiv.org/abs/1903.03176

      https://github.com/kenjyoung/MinAtar/blob/4241f24685/examples/dqn.py
    """
    return torch.rmsprop(learning_rate, alpha=0.95, eps=0.01, centered=True)


def impala(
    total_steps: int, learning_rate: ArrayLike = 4.8e-4
) -> optax.GradientTransformation:
    """IMPALA on DeepMind Lab: the learning rate falls linearly to 0.

    TensorFlow 1's dialect, where the mean square starts from 1, with a decay of 0.99,
    epsilon 0.1 and no momentum, without clipping: the defaults of ``experiment.py``.
    For DMLab-30 the README has a learning rate of 0.00031866995608948655.

    Loss: the sum over batch and time of the policy's loss, plus half the sum of half
    the squared advantages, and the negative entropy. With a mean over B * T elements
    the gradients are B * T times smaller, and an epsilon of 0.1 dominates the
    denominator. The README has B = 32, and the code T = 100.

    On Atari the paper has a learning rate of 6e-4, epsilon 0.01, no momentum, and clips
    the global norm to 40, with B = 32 and T = 20: read in Table S6 of Such et al., who
    quote the paper. `impala_torchbeast` and `impala_cleanba` have such numbers in
    PyTorch's dialect, which is another optimizer. TensorFlow's dialect is
    ``optax.chain(optax.clip_by_global_norm(40.0), dialects.tensorflow.rmsprop(
    optax.linear_schedule(6e-4, 0.0, total_steps), 0.99, epsilon=0.01))``, with the
    decay of ``experiment.py``, because the table has none.

    Args:
      total_steps: the number of updates until the learning rate is 0. The code counts
        frames, by default 1e9; an update takes batch size * unroll length * action
        repeats of them.
      learning_rate: the rate of the first step.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.impala(total_steps=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.ones(1), state)
      ...     print(updates.round(6))
      [-0.000458]
      [-0.000229]
      [-0.]

    References:
      Espeholt et al., 2018, IMPALA: Scalable Distributed Deep-RL with Importance
      Weighted Actor-Learner Architectures, https://arxiv.org/abs/1802.01561

      DeepMind, ``README.md`` and
      https://github.com/google-deepmind/scalable_agent/blob/6c0c8a7019/experiment.py

      Such et al., 2019, An Atari Model Zoo for Analyzing, Visualizing, and Comparing
      Deep Reinforcement Learning Agents, https://arxiv.org/abs/1812.07069
    """
    rates = linear_to_zero(learning_rate, total_steps)
    return tensorflow.rmsprop(rates, decay=0.99, epsilon=0.1)


def impala_torchbeast(
    total_steps: int, learning_rate: ArrayLike = 4.8e-4
) -> optax.GradientTransformation:
    """IMPALA on Atari, as TorchBeast trains it: linearly to 0.

    PyTorch's dialect, with epsilon 0.01 outside the root, a decay of 0.99, a mean
    square from 0 and no momentum, after clipping to a global norm of 40: the defaults
    of ``monobeast.py``. The run in its README has a learning rate of 4e-4.

    Loss: the sum over batch and time (8 * 80 elements by default) of the policy's loss,
    plus half the sum of half the squared advantages, and the negative entropy.

    Args:
      total_steps: the number of updates until the learning rate is 0. The code counts
        frames; an update takes batch size * unroll length of them.
      learning_rate: the rate of the first step.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.impala_torchbeast(total_steps=100)
      >>> updates, _ = tx.update(jnp.array([0.1, 100.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(6))
      [-0.001371 -0.004788]

    References:
      Küttler et al., 2019, TorchBeast: A PyTorch Platform for Distributed RL,
      https://arxiv.org/abs/1910.03552

      https://github.com/facebookresearch/torchbeast/blob/0af07b051a/torchbeast/monobeast.py
    """
    return _impala_on_atari(linear_to_zero(learning_rate, total_steps))


def impala_cleanba(
    total_steps: int, learning_rate: ArrayLike = 6e-4, minibatches: int = 4
) -> optax.GradientTransformation:
    """IMPALA on Atari, as Cleanba trains it: to 0 in steps of one iteration.

    PyTorch's dialect with the numbers of `impala_torchbeast`, except the learning rate,
    which changes only after every ``minibatches`` updates.

    Loss: the sum over the batch and time of a minibatch on one device of the policy's
    loss, plus half the sum of half the squared errors of V-trace, and the negative
    entropy; then the mean over devices.

    Args:
      total_steps: the number of updates until the learning rate is 0, a multiple of
        ``minibatches`` in the code.
      learning_rate: the rate of the first iteration.
      minibatches: the number of updates in one iteration.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.impala_cleanba(total_steps=4, minibatches=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(4):
      ...     updates, state = tx.update(jnp.full(1, 100.0), state)
      ...     print(updates.round(5))
      [-0.00599]
      [-0.00425]
      [-0.00174]
      [-0.00151]

    References:
      Huang et al., 2023, Cleanba: A Reproducible and Efficient Distributed
      Reinforcement Learning Platform, https://arxiv.org/abs/2310.00036

      https://github.com/vwxyzjn/cleanba/blob/d1f8979c33/cleanba/cleanba_impala.py
    """
    minibatches = checks.check_steps("minibatches", minibatches)
    decayed = linear_to_zero(learning_rate, total_steps)

    def rates(count):
        return decayed(count - count % minibatches)

    return _impala_on_atari(rates)


def _impala_on_atari(rates: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(40.0), torch.rmsprop(rates, alpha=0.99, eps=0.01)
    )


def a3c(
    total_steps: int, learning_rate: ArrayLike = 7e-4
) -> optax.GradientTransformation:
    """A3C on Atari: the learning rate falls linearly to 0.

    A decay of 0.99, epsilon 0.1 inside the root and no momentum, from an e-mail of an
    author of the paper that the wiki of async-rl quotes: the optimizer is that of
    equations 8 and 9 of the paper. A mean square from 0 is that of async-rl and pfrl;
    no source says where the authors' starts. The workers share one mean square, as
    devices do here.

    Loss: the sum over the steps between two updates, at most 5, of the policy's loss
    and of half the squared error of the value, whose gradient is halved once more. The
    authors clip no gradient; pfrl clips the global norm to 40.

    The paper samples the learning rate from LogUniform(1e-4, 1e-2).

    Args:
      total_steps: the number of updates until the learning rate is 0.
      learning_rate: the rate of the first step.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.a3c(total_steps=100)
      >>> updates, _ = tx.update(jnp.array([0.1, 10.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(6))
      [-0.000221 -0.006674]

    References:
      Mnih et al., 2016, Asynchronous Methods for Deep Reinforcement Learning,
      https://arxiv.org/abs/1602.01783

      Fujita, async-rl, https://github.com/muupan/async-rl/wiki and
      https://github.com/muupan/async-rl/blob/5c5844fe7d/a3c.py

      pfrl,
      https://github.com/pfnet/pfrl/blob/c8cb332889/examples/atari/reproduction/a3c/train_a3c.py
    """
    rates = linear_to_zero(learning_rate, total_steps)
    return _rmsprop.rmsprop(rates, decay=0.99, eps=0.1)


def a2c(
    total_steps: int, learning_rate: ArrayLike = 7e-4
) -> optax.GradientTransformation:
    """A2C of OpenAI Baselines: clipped to a global norm of 0.5, linearly to 0.

    TensorFlow 1's dialect, where the mean square starts from 1, with a decay of 0.99,
    epsilon 1e-5 and no momentum. Baselines evaluates the learning rate at the end of
    each batch, this recipe at the beginning.

    Loss: the mean over the batch of the policy's loss, plus half the mean of the
    squared error of the value, less 0.01 times the mean entropy.

    Args:
      total_steps: the number of updates until the learning rate is 0. Baselines counts
        80e6 time steps; an update takes environments * 5 of them.
      learning_rate: the rate of the first step.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.a2c(total_steps=100)
      >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(6))
      [-0.000211 -0.000281]

    References:
      OpenAI Baselines,
      https://github.com/openai/baselines/blob/ea25b9e8b2/baselines/a2c/a2c.py
    """
    rates = linear_to_zero(learning_rate, total_steps)
    return optax.chain(
        optax.clip_by_global_norm(0.5),
        tensorflow.rmsprop(rates, decay=0.99, epsilon=1e-5),
    )


def a2c_stable_baselines3(
    learning_rate: LearningRate = 7e-4, *, tf_like: bool = False
) -> optax.GradientTransformation:
    """A2C of stable-baselines3: clipped to a global norm of 0.5.

    A decay of 0.99, epsilon 1e-5 and no momentum, in one of two dialects:

    * by default PyTorch's, with epsilon outside the root and a mean square from 0;
    * ``tf_like``: that of ``RMSpropTFLike``, with epsilon inside the root and a mean
      square from 1. The documentation of stable-baselines3 asks for this class to match
      the curves of OpenAI Baselines, that is, of `a2c`.

    Without the clipping to 0.5 the run is another one. The learning rate is constant by
    default; with `a2c` it falls to 0.

    Loss: the mean over the batch of the policy's loss, plus half the mean of the
    squared error of the value, and no entropy by default.

    Args:
      learning_rate: a number, a scalar array, or a schedule.
      tf_like: whether the optimizer is ``RMSpropTFLike``.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> for tf_like in (False, True):
      ...     tx = recipes.a2c_stable_baselines3(tf_like=tf_like)
      ...     updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
      ...     print(updates.round(6))
      [-0.006998 -0.006998]
      [-0.000211 -0.000281]

    References:
      Raffin et al., 2021, Stable-Baselines3: Reliable Reinforcement Learning
      Implementations, https://jmlr.org/papers/v22/20-1364.html

      ``common/sb2_compat/rmsprop_tf_like.py`` and
      https://github.com/DLR-RM/stable-baselines3/blob/e05d2dbe6e/stable_baselines3/a2c/a2c.py
    """
    is_tf_like = checks.check_flag("tf_like", tf_like)
    rmsprop = torch.rmsprop_tf_like if is_tf_like else torch.rmsprop
    return optax.chain(
        optax.clip_by_global_norm(0.5), rmsprop(learning_rate, alpha=0.99, eps=1e-5)
    )
