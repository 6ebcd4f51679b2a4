# SPDX-License-Identifier: Apache-2.0
"""Recurrent networks that write."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms.dialects import torch
from optax_rms.recipes._schedules import staircase


def graves_handwriting(learning_rate: ArrayLike = 1e-4) -> optax.GradientTransformation:
    """Recurrent networks that write by hand: centered RMSProp with momentum.

    A decay of 0.95, a momentum of 0.9 with the learning rate inside, and epsilon 1e-4
    inside the root; averages from 0. The numbers are those of equations 42 to 45 of the
    paper, in Section 4.2.

    Loss: the negative logarithm of the density of a sequence, a sum over its points.
    Within the backward pass, which is no part of the optimizer, the paper clips the
    derivatives of the outputs to [-100, 100] and of the LSTM layers to [-10, 10].

    The paper was read in a transcription without equation 40, the step itself, and with
    unclear symbols for the decays of equations 38 and 39. Here both averages decay with
    0.95, and every number has the place of Chainer's ``RMSpropGraves``.

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
      Graves, 2013, Generating Sequences With Recurrent Neural Networks, eq. 38-45,
      https://arxiv.org/abs/1308.0850

      Chainer,
      https://github.com/chainer/chainer/blob/a8e15cbe55/chainer/optimizers/rmsprop_graves.py
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
    [-5, 5] before.

    Loss: the sum over the 50 characters of a sequence and the mean over the batch of 50
    sequences. A comment in the code says that the division by the length would have no
    effect on RMSProp. It would have an effect on the clipping.

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

      https://github.com/karpathy/char-rnn/blob/6f9487a6fe/train.lua
    """
    steps_per_epoch = checks.check_steps("steps_per_epoch", steps_per_epoch)
    decayed = staircase(learning_rate, steps_per_epoch, 0.97)

    def rates(count):
        step = jnp.asarray(count, jnp.result_type(float))
        return decayed(jnp.maximum(step - 9 * steps_per_epoch, 0))

    return optax.chain(optax.clip(5.0), torch.rmsprop(rates, 0.95, 1e-8))
