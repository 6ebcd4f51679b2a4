# SPDX-License-Identifier: Apache-2.0
"""Generative adversarial networks."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_rms import _checks as checks
from optax_rms import _rmsprop
from optax_rms._types import PyTree
from optax_rms.dialects import torch


def wgan(
    network: Literal["critic", "generator"], learning_rate: ArrayLike = 5e-5
) -> optax.GradientTransformation:
    """Wasserstein GAN; after every step the weights of the critic are clipped to 0.01.

    PyTorch's RMSProp with the default decay of 0.99, epsilon 1e-8 outside the root, and
    no momentum.

    Loss: the mean over a batch of 64 of the critic's output, for real images less that
    for generated images. The critic takes 5 steps per step of the generator. The code,
    and not the paper, has 100 instead of 5 at the first 25 steps of the generator and
    at every 500th.

    Algorithm 1 of the paper clips after each step of the critic, as here. The code
    clips before each step, and so clips the initial weights as well:
    ``jax.tree.map(lambda w: jnp.clip(w, -0.01, 0.01), params)``. Here a weight may
    exceed 0.01 by the rounding of one addition.

    Args:
      network: ``"critic"``, with clipping, or ``"generator"``, without.
      learning_rate: a number or scalar array.

    Returns:
      A gradient transformation. For the critic, ``update`` needs the parameters.

    Raises:
      ValueError: ``network`` is another string; ``update`` of the critic lacks the
        parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_rms import recipes
      >>> tx = recipes.wgan("critic")
      >>> params = jnp.array([0.0, 0.0098])
      >>> updates, _ = tx.update(jnp.array([1.0, -1.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates).round(5))
      [-0.0005  0.01  ]

    References:
      Arjovsky, Chintala and Bottou, 2017, Wasserstein GAN, Algorithm 1,
      https://arxiv.org/abs/1701.07875

      https://github.com/martinarjovsky/WassersteinGAN/blob/f7a01e8200/main.py
    """
    chosen = checks.check_choice("network", network, ("critic", "generator"))
    rmsprop = torch.rmsprop(learning_rate, alpha=0.99, eps=1e-8)
    if chosen == "generator":
        return rmsprop
    return optax.chain(rmsprop, optax.stateless(_clip_weights))


def _clip_weights(updates: PyTree, params: PyTree | None) -> PyTree:
    """Shorten the updates so that the new weights lie in [-0.01, 0.01]."""
    if params is None:
        raise ValueError("update needs the parameters, to clip the weights.")

    def clip(u, p):
        if u is None:
            return None
        p = jnp.asarray(p).astype(u.dtype)
        return jnp.clip(p + u, -0.01, 0.01) - p

    return jax.tree.map(clip, updates, params, is_leaf=lambda u: u is None)


def stylegan2(
    network: Literal["generator", "discriminator"], learning_rate: ArrayLike = 2e-3
) -> optax.GradientTransformation:
    """StyleGAN2 with lazy regularization: RMSProp with bias correction.

    Adam with b1 = 0 is RMSProp with bias correction and epsilon outside the root, here
    1e-8. Every k steps, 4 for the generator and 16 for the discriminator, the gradient
    of the regularization is one more step of the same optimizer. In return the learning
    rate is multiplied by k / (k + 1), and the decay is 0.99^(k / (k + 1)).

    Loss: the mean over the batch (32 in the configuration ``stylegan2``) of the
    logistic loss. The regularization of every k-th step is multiplied by k.

    Disputed: epsilon. The first code, in TensorFlow, adds epsilon before the bias
    correction, and not after. Epsilon is then 1 / sqrt(1 - decay^t) times larger, that
    is, up to 10 times, which matters only for gradients below 1e-6.

    Args:
      network: ``"generator"`` or ``"discriminator"``.
      learning_rate: that of the paper, before the factor k / (k + 1).

    Returns:
      A gradient transformation.

    Raises:
      ValueError: ``network`` is another string.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> for network in ("generator", "discriminator"):
      ...     tx = recipes.stylegan2(network)
      ...     print(tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))[0].round(6))
      [-0.0016]
      [-0.001882]

    References:
      Karras et al., 2020, Analyzing and Improving the Image Quality of StyleGAN,
      https://arxiv.org/abs/1912.04958

      ``train.py`` and
      https://github.com/NVlabs/stylegan2-ada-pytorch/blob/d72cc7d041/training/training_loop.py

      in TensorFlow, ``run_training.py`` and
      https://github.com/NVlabs/stylegan2/blob/bf0fe0baba/dnnlib/tflib/optimizer.py
    """
    interval = 4 if _is_generator(network) else 16
    share = interval / (interval + 1)
    learning_rate = checks.check_number("learning_rate", learning_rate)
    return _adam_without_momentum(share * learning_rate, 0.99**share)


def biggan(
    network: Literal["generator", "discriminator"],
    learning_rate: ArrayLike | None = None,
) -> optax.GradientTransformation:
    """BigGAN: RMSProp with bias correction, which is Adam with b1 = 0.

    A decay of 0.999 and epsilon 1e-8 outside the root; a learning rate of 5e-5 for the
    generator and 2e-4 for the discriminator: the defaults of the first author's
    PyTorch code. The paper's own text was not found.

    Loss: the mean over the batch of the hinge loss.

    Disputed: the settings for a batch of 2048. The script ``launch_BigGAN_bs256x8.sh``
    of the same repository has 1e-4 and 4e-4, epsilon 1e-6, and one step of the
    discriminator per step of the generator.

    Args:
      network: ``"generator"`` or ``"discriminator"``.
      learning_rate: a number or scalar array; ``None`` is 5e-5 or 2e-4.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: ``network`` is another string.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_rms import recipes
      >>> tx = recipes.biggan("discriminator")
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (1.0, 7.0):
      ...     updates, state = tx.update(jnp.full(1, g), state)
      ...     print(updates.round(6))
      [-0.0002]
      [-0.00028]

    References:
      Brock, Donahue and Simonyan, 2019, Large Scale GAN Training for High Fidelity
      Natural Image Synthesis, https://arxiv.org/abs/1809.11096

      ``utils.py``, ``losses.py`` and
      https://github.com/ajbrock/BigGAN-PyTorch/blob/98459431a5/BigGAN.py
    """
    default = 5e-5 if _is_generator(network) else 2e-4
    learning_rate = default if learning_rate is None else learning_rate
    return _adam_without_momentum(learning_rate, 0.999)


def _is_generator(network: str) -> bool:
    networks = ("generator", "discriminator")
    return checks.check_choice("network", network, networks) == "generator"


def _adam_without_momentum(
    learning_rate: ArrayLike, decay: float
) -> optax.GradientTransformation:
    return _rmsprop.rmsprop(
        learning_rate, decay, eps=1e-8, eps_in_sqrt=False, bias_correction=True
    )
