# SPDX-License-Identifier: Apache-2.0
"""Published settings of RMSProp: source, dialect, and what is disputed.

Every number was read in the code that the docstring names, except numbers marked "from
memory", which were not looked up: check them before you rely on them.

An epsilon, like a bound on gradients, has the scale of the gradients. Each recipe
therefore says whether the loss is a sum or a mean over the batch: with a mean over 32
samples, gradients are 32 times smaller than with a sum.
"""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms.dialects import tensorflow, torch
from optax_rms.dialects.keras import _schedules as schedules

__all__ = [
    "a2c",
    "a3c",
    "char_rnn",
    "dqn",
    "efficientnet",
    "graves_handwriting",
    "impala",
    "inception_v3",
    "mnasnet",
    "mobilenet_v3",
]


def __dir__() -> list[str]:
    return __all__


def dqn(learning_rate: ArrayLike = 2.5e-4) -> optax.GradientTransformation:
    """Deep Q-network on Atari, as in Nature.

    Centered, with a decay of 0.95, epsilon 0.01 inside the root, averages from 0 and no
    momentum: the rule of DeepMind's Lua code, in ``NeuralQLearner.lua``.

    The "gradient momentum 0.95" in the paper's table is disputed. In DeepMind's code
    0.95 is the decay of the mean gradient, and there is no momentum. Reimplementations
    differ: Dopamine has epsilon 1e-5 and averages that start from 1, that is,
    ``dialects.tensorflow.rmsprop(2.5e-4, 0.95, epsilon=1e-5, centered=True)``.

    The paper also clips the temporal difference to [-1, 1], and has batches of 32. The
    code sums the loss over the batch (from memory; so does pfrl's reproduction), and
    has the gradient of half the squared error. With a mean, gradients are 32 times
    smaller next to the same epsilon, and steps up to 32 times shorter: multiply a mean
    by the batch size.

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
      https://doi.org/10.1038/nature14236

      DeepMind, https://github.com/google-deepmind/dqn
    """
    return _rmsprop.rmsprop(learning_rate, decay=0.95, eps=0.01, centered=True)


def impala(
    total_steps: int, learning_rate: ArrayLike = 4.8e-4
) -> optax.GradientTransformation:
    """IMPALA on DeepMind Lab: the learning rate falls linearly to 0.

    TensorFlow 1's dialect, where the mean square starts from 1, with a decay of 0.99,
    epsilon 0.1 and no momentum: the flags of DeepMind's ``experiment.py``, which does
    not clip gradients. The loss is a sum over batch and time. With a mean over B * T
    elements the gradients are B * T times smaller, and an epsilon of 0.1 dominates the
    denominator.

    On Atari the paper has another epsilon, 0.01, and clips the global norm to 40 (both
    from memory). TorchBeast has these numbers in PyTorch's dialect:
    ``dialects.torch.rmsprop(4.8e-4, 0.99, 0.01)``. It is another optimizer.

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

      DeepMind, https://github.com/google-deepmind/scalable_agent
    """
    rates = _linear_to_zero(learning_rate, total_steps)
    return tensorflow.rmsprop(rates, decay=0.99, epsilon=0.1)


def a3c(
    total_steps: int, learning_rate: ArrayLike = 7e-4
) -> optax.GradientTransformation:
    """A3C on Atari: the learning rate falls linearly to 0.

    A decay of 0.99, epsilon 0.1 inside the root and no momentum, from an e-mail of an
    author of the paper that the wiki of async-rl quotes. A mean square that starts from
    0 is an assumption. The workers share one mean square, as devices do here. async-rl
    sums the loss over the steps between two updates, and epsilon has the scale of
    gradients of this sum.

    The paper tried many learning rates, and halves the gradient of the value, which is
    a factor of the loss.

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

      Fujita, async-rl, https://github.com/muupan/async-rl/wiki
    """
    rates = _linear_to_zero(learning_rate, total_steps)
    return _rmsprop.rmsprop(rates, decay=0.99, eps=0.1)


def a2c(
    total_steps: int, learning_rate: ArrayLike = 7e-4
) -> optax.GradientTransformation:
    """A2C of OpenAI Baselines: clipped to a global norm of 0.5, linearly to 0.

    TensorFlow 1's dialect, where the mean square starts from 1, with a decay of 0.99,
    epsilon 1e-5 and no momentum, for a loss that is the mean over a batch. Baselines
    evaluates the learning rate at the end of each batch, this recipe at the beginning.

    stable-baselines3 has the same numbers in PyTorch's dialect, a constant learning
    rate, and the same clipping to 0.5:
    ``optax.chain(optax.clip_by_global_norm(0.5), dialects.torch.rmsprop(7e-4, 0.99,
    1e-5))``. Its curves agree with the original only with ``RMSpropTFLike``, where the
    mean square starts from 1: ``dialects.torch.rmsprop_tf_like``.

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
      OpenAI Baselines, ``baselines/a2c/a2c.py``, https://github.com/openai/baselines
    """
    rates = _linear_to_zero(learning_rate, total_steps)
    return optax.chain(
        optax.clip_by_global_norm(0.5),
        tensorflow.rmsprop(rates, decay=0.99, epsilon=1e-5),
    )


def inception_v3(
    steps_per_epoch: int, learning_rate: ArrayLike = 0.1
) -> optax.GradientTransformation:
    """Inception v3 on ImageNet: the learning rate is multiplied by 0.16 per 30 epochs.

    TensorFlow 1's dialect, where the mean square starts from 1, with a decay of 0.9, a
    momentum of 0.9 and an epsilon of 1: TensorFlow's ``inception_train.py``. Such an
    epsilon makes RMSProp nearly gradient descent with momentum.

    The paper has a learning rate of 0.045, times 0.94 per 2 epochs, and clips gradients
    to a norm of 2 (from memory).

    Args:
      steps_per_epoch: the number of batches in the data.
      learning_rate: the rate of the first 30 epochs.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.inception_v3(steps_per_epoch=40000)
      >>> updates, _ = tx.update(jnp.array([0.1, 10.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(4))
      [-0.0073 -0.2899]

    References:
      Szegedy et al., 2016, Rethinking the Inception Architecture for Computer Vision,
      https://arxiv.org/abs/1512.00567

      TensorFlow, ``research/inception``, https://github.com/tensorflow/models
    """
    steps_per_epoch = checks.check_steps("steps_per_epoch", steps_per_epoch)
    rates = _staircase(learning_rate, 30 * steps_per_epoch, 0.16)
    return tensorflow.rmsprop(rates, decay=0.9, momentum=0.9, epsilon=1.0)


def efficientnet(
    steps_per_epoch: int, batch_size: int = 4096, learning_rate: ArrayLike | None = None
) -> optax.GradientTransformation:
    """EfficientNet on ImageNet: five epochs of warm-up, then times 0.97 per 2.4 epochs.

    TensorFlow 1's dialect, where the mean square starts from 1, with a decay of 0.9, a
    momentum of 0.9 and an epsilon of 0.001: ``efficientnet/utils.py`` of TensorFlow's
    TPU models, which has the schedule as well. The learning rate, 0.016 per 256 images,
    was read in a copy of their documentation only.

    Not included are a weight decay of 1e-5, as a term of the loss, and the average of
    the weights with a decay of 0.9999 that is evaluated (both from memory): see
    ``optax.add_decayed_weights`` (before this) and ``optax.ema``.

    Args:
      steps_per_epoch: the number of batches in the data.
      batch_size: the number of images in a batch, all devices together.
      learning_rate: the rate after the warm-up; ``None`` is 0.016 * batch_size / 256.

    Returns:
      A gradient transformation. The first step is 0, as the warm-up begins from there.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.efficientnet(steps_per_epoch=1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.ones(1), state)
      ...     print(updates.round(4))
      [0.]
      [-0.0512]
      [-0.1484]

    References:
      Tan and Le, 2019, EfficientNet: Rethinking Model Scaling for Convolutional Neural
      Networks, https://arxiv.org/abs/1905.11946

      TensorFlow, ``models/official/efficientnet``, https://github.com/tensorflow/tpu
    """
    steps_per_epoch = checks.check_steps("steps_per_epoch", steps_per_epoch)
    scaled = 0.016 * checks.check_steps("batch_size", batch_size) / 256
    rate = scaled if learning_rate is None else learning_rate
    decayed = _staircase(rate, 2.4 * steps_per_epoch, 0.97)
    warmup_steps = 5 * steps_per_epoch

    def rates(count):
        step = jnp.asarray(count, jnp.result_type(float))
        return jnp.where(
            step < warmup_steps, rate * step / warmup_steps, decayed(count)
        )

    return tensorflow.rmsprop(rates, decay=0.9, momentum=0.9, epsilon=0.001)


def mnasnet(
    steps_per_epoch: int, batch_size: int = 4096, learning_rate: ArrayLike | None = None
) -> optax.GradientTransformation:
    """MnasNet on ImageNet, whose code shares the optimizer with `efficientnet`.

    Args:
      steps_per_epoch: as for `efficientnet`.
      batch_size: as for `efficientnet`.
      learning_rate: as for `efficientnet`.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.mnasnet(steps_per_epoch=1)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(1), state)
      >>> print(updates.round(4))
      [-0.0512]

    References:
      Tan et al., 2019, MnasNet: Platform-Aware Neural Architecture Search for Mobile,
      https://arxiv.org/abs/1807.11626
    """
    return efficientnet(steps_per_epoch, batch_size, learning_rate)


def mobilenet_v3(
    steps_per_epoch: int, learning_rate: ArrayLike = 0.064
) -> optax.GradientTransformation:
    """MobileNetV3 on ImageNet, as torchvision trains it: times 0.973 per 2 epochs.

    PyTorch's dialect, with epsilon outside the root and the learning rate outside the
    momentum: a decay of 0.9, a momentum of 0.9, epsilon 0.0316 and a weight decay of
    1e-5. The epsilon outside the root, 0.0316, replaces an epsilon of 0.001 inside the
    root: 0.0316 is the root of 0.001. torchvision has batches of 8 * 128 images and 600
    epochs.

    The paper trains in TensorFlow 1's dialect, with a learning rate of 0.1 for batches
    of 4096, times 0.99 per 3 epochs, and the same decay, momentum and weight decay, but
    no epsilon is given. (All of this paragraph is from memory.)

    Args:
      steps_per_epoch: the number of batches in the data.
      learning_rate: the rate of the first two epochs.

    Returns:
      A gradient transformation. Its ``update`` needs the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.mobilenet_v3(steps_per_epoch=1000)
      >>> params = jnp.ones(2)
      >>> updates, _ = tx.update(jnp.array([1e-3, 1.0]), tx.init(params), params)
      >>> print(updates.round(4))
      [-0.002 -0.184]

    References:
      Howard et al., 2019, Searching for MobileNetV3, https://arxiv.org/abs/1905.02244

      torchvision, ``references/classification``, https://github.com/pytorch/vision
    """
    steps_per_epoch = checks.check_steps("steps_per_epoch", steps_per_epoch)
    rates = _staircase(learning_rate, 2 * steps_per_epoch, 0.973)
    return torch.rmsprop(rates, 0.9, 0.0316, weight_decay=1e-5, momentum=0.9)


def graves_handwriting(learning_rate: ArrayLike = 1e-4) -> optax.GradientTransformation:
    """Recurrent networks that write by hand: centered RMSProp with momentum.

    A decay of 0.95, a momentum of 0.9 with the learning rate inside, and epsilon 1e-4
    inside the root; averages from 0. The numbers are from memory, and are the defaults
    of Chainer's ``RMSpropGraves``, which implements equations 38 to 45 of the paper.

    Args:
      learning_rate: a number or scalar array.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.graves_handwriting()
      >>> updates, _ = tx.update(jnp.array([0.1, 10.0]), tx.init(jnp.zeros(2)))
      >>> print(updates.round(6))
      [-0.000417 -0.000459]

    References:
      Graves, 2013, Generating Sequences With Recurrent Neural Networks,
      https://arxiv.org/abs/1308.0850
    """
    return _rmsprop.rmsprop(
        learning_rate, decay=0.95, eps=1e-4, centered=True, momentum=0.9
    )


def char_rnn(
    steps_per_epoch: int, learning_rate: ArrayLike = 2e-3
) -> optax.GradientTransformation:
    """Karpathy's char-rnn: times 0.97 per epoch after the tenth.

    The dialect of Lua's ``optim.rmsprop``, which is PyTorch's: a decay of 0.95, epsilon
    1e-8 outside the root, no momentum. Gradients are clipped element by element to
    [-5, 5] before; they are of a loss that is the sum over the characters of a sequence
    and the mean over the batch.

    Args:
      steps_per_epoch: the number of batches in the data.
      learning_rate: that of the first ten epochs.

    Returns:
      A gradient transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.char_rnn(steps_per_epoch=400)
      >>> _, state = tx.update(jnp.array([5.0, 50.0]), tx.init(jnp.zeros(2)))
      >>> updates, _ = tx.update(jnp.array([1.0, 1.0]), state)
      >>> print(updates.round(5))
      [-0.0018 -0.0018]

    References:
      Karpathy, 2015, The Unreasonable Effectiveness of Recurrent Neural Networks,
      https://karpathy.github.io/2015/05/21/rnn-effectiveness/

      Karpathy, ``train.lua``, https://github.com/karpathy/char-rnn
    """
    steps_per_epoch = checks.check_steps("steps_per_epoch", steps_per_epoch)
    decayed = _staircase(learning_rate, steps_per_epoch, 0.97)

    def rates(count):
        step = jnp.asarray(count, jnp.result_type(float))
        return decayed(jnp.maximum(step - 9 * steps_per_epoch, 0))

    return optax.chain(optax.clip(5.0), torch.rmsprop(rates, 0.95, 1e-8))


def _linear_to_zero(learning_rate: ArrayLike, total_steps: int) -> optax.Schedule:
    learning_rate = checks.check_number("learning_rate", learning_rate)
    total_steps = checks.check_steps("total_steps", total_steps)
    return optax.linear_schedule(learning_rate, 0.0, total_steps)


def _staircase(
    learning_rate: ArrayLike, period: float, factor: float
) -> optax.Schedule:
    learning_rate = checks.check_number("learning_rate", learning_rate)
    return schedules.exponential_decay(learning_rate, period, factor, staircase=True)
