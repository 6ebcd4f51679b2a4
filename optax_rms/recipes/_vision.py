# SPDX-License-Identifier: Apache-2.0
"""Image classification."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms.dialects import tensorflow, torch
from optax_rms.recipes._schedules import staircase


def inception_v3(
    steps_per_epoch: int, learning_rate: ArrayLike = 0.1
) -> optax.GradientTransformation:
    """Inception v3 on ImageNet: the learning rate is multiplied by 0.16 per 30 epochs.

    TensorFlow 1's dialect, where the mean square starts from 1, with a decay of 0.9, a
    momentum of 0.9 and an epsilon of 1, without clipping: TensorFlow's
    ``inception_train.py``. Such an epsilon makes RMSProp nearly gradient descent with
    momentum.

    Loss: the mean over the batch (256 in the code's comment) of the cross-entropy, plus
    0.4 times the same for the auxiliary head, with labels smoothed by 0.1, plus 4e-5
    times half the sum of the squared weights of convolutions and dense layers. This
    last part can be added to the gradients instead, where ``mask`` selects the weights:
    ``optax.chain(optax.add_decayed_weights(4e-5, mask), recipes.inception_v3(...))``.

    Disputed: the schedule. The paper (Section 8) has a learning rate of 0.045, times
    0.94 per 2 epochs, batches of 32, and clips gradients with a threshold of 2.0. It
    does not say whether by norm or by value, and names no momentum for RMSProp.

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
      Szegedy et al., 2015, Rethinking the Inception Architecture for Computer Vision,
      https://arxiv.org/abs/1512.00567

      TensorFlow, ``inception_model.py``, ``slim/losses.py`` and
      https://github.com/tensorflow/models/blob/4f77686de8/research/inception/inception/inception_train.py
    """
    steps_per_epoch = checks.check_steps("steps_per_epoch", steps_per_epoch)
    rates = staircase(learning_rate, 30 * steps_per_epoch, 0.16)
    return tensorflow.rmsprop(rates, decay=0.9, momentum=0.9, epsilon=1.0)


def efficientnet(
    steps_per_epoch: int, batch_size: int = 4096, learning_rate: ArrayLike | None = None
) -> optax.GradientTransformation:
    """EfficientNet on ImageNet: five epochs of warm-up, then times 0.97 per 2.4 epochs.

    TensorFlow 1's dialect, where the mean square starts from 1, with a decay of 0.9, a
    momentum of 0.9 and an epsilon of 0.001: ``build_optimizer`` in
    ``efficientnet/utils.py`` of TensorFlow's TPU models. The learning rate, 0.016 per
    256 images, is a flag of ``main.py``. Section 5.2 of the paper has the same numbers,
    but neither epsilon nor the warm-up.

    Loss: the mean over the batch of the cross-entropy, with labels smoothed by 0.1,
    plus 1e-5 times half the sum of the squared weights, without batch normalization.
    This last part can be added to the gradients instead:
    ``optax.chain(optax.add_decayed_weights(1e-5, mask), recipes.efficientnet(...))``.

    The weights that are evaluated are an average, with a decay of
    min(0.9999, (1 + t) / (10 + t)) at step t.

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

      TensorFlow, ``main.py`` and
      https://github.com/tensorflow/tpu/blob/7dc921f846/models/official/efficientnet/utils.py
    """
    steps_per_epoch = checks.check_steps("steps_per_epoch", steps_per_epoch)
    scaled = 0.016 * checks.check_steps("batch_size", batch_size) / 256
    rate = scaled if learning_rate is None else learning_rate
    decayed = staircase(rate, 2.4 * steps_per_epoch, 0.97)
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

    The paper (Section 5) has the numbers of this recipe, except epsilon. Loss, weight
    decay and the average of the weights are those of `efficientnet`.

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
      Tan et al., 2018, MnasNet: Platform-Aware Neural Architecture Search for Mobile,
      https://arxiv.org/abs/1807.11626

      TensorFlow, ``mnas_utils.py`` and
      https://github.com/tensorflow/tpu/blob/7dc921f846/models/official/mnasnet/mnasnet_main.py
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

    Loss: the mean over the batch of the cross-entropy; the weight decay is included
    here.

    Disputed: the dialect. The paper (Section 6.1.1) trains with TensorFlow's optimizer,
    a learning rate of 0.1, times 0.99 per 3 epochs, batches of 4096, and the same
    momentum and weight decay. It names neither decay nor epsilon, and TensorFlow's
    model garden has no settings of this network: its README, in
    ``research/slim/nets/mobilenet``, says that they are to be added.

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

      torchvision, ``README.md`` and
      https://github.com/pytorch/vision/blob/017e9b99b5/references/classification/train.py
    """
    steps_per_epoch = checks.check_steps("steps_per_epoch", steps_per_epoch)
    rates = staircase(learning_rate, 2 * steps_per_epoch, 0.973)
    return torch.rmsprop(rates, 0.9, 0.0316, weight_decay=1e-5, momentum=0.9)
