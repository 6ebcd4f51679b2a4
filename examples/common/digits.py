# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits, and the network that the examples train on them.

The network is common in tutorials on RMSProp: a dense layer of 128 ReLU units and a
softmax of 10, trained on cross-entropy.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from .command_line import InputError


class Examples(NamedTuple):
    """Images `[n, pixels]` and their labels `[n]`, 0 to 9."""

    images: Any
    labels: Any


class Network(nn.Module):
    """A dense layer of 128 ReLU units and one of 10 logits."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = nn.relu(nn.Dense(128)(images))
        return nn.Dense(10)(hidden)


def load(npz: Path | None = None) -> list[Examples]:
    """Training examples, and test examples if the source has them.

    Args:
      npz: `None` for the 1,797 digits of 8x8 pixels that come with scikit-learn, or a
        file in the layout of Keras' `mnist.npz`: `x_train` and `x_test`, uint8
        `[n, 28, 28]`, and `y_train` and `y_test`, integers `[n]` from 0 to 9.

    Raises:
      InputError: the file cannot be read or has another layout.
    """
    if npz is None:
        from sklearn.datasets import load_digits

        return [Examples(*load_digits(return_X_y=True))]

    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with open(npz, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive}
    except OSError as error:
        raise InputError(f"{npz}: {error.strerror or error}") from error
    # A damaged archive can raise almost anything from NumPy, zipfile and zlib.
    except Exception as error:
        raise InputError(f"{npz}: not a readable npz file") from error
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f"{npz}: has no array {', '.join(missing)}")
    return [
        _check_mnist(npz, part, arrays[f"x_{part}"], arrays[f"y_{part}"])
        for part in ("train", "test")
    ]


def _check_mnist(
    npz: Path, part: str, images: np.ndarray, labels: np.ndarray
) -> Examples:
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or not len(images):
        raise InputError(
            f"{npz}: x_{part} must be uint8 of shape [n, 28, 28] with n > 0, "
            f"not {images.dtype} of shape {list(images.shape)}"
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(
            f"{npz}: y_{part} must be integers of shape [{len(images)}], "
            f"not {labels.dtype} of shape {list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise InputError(
            f"{npz}: y_{part} must lie in 0..9, not in {labels.min()}..{labels.max()}"
        )
    return Examples(images.reshape(len(images), -1), labels)


def prepare(training: Examples, *others: Examples, seed: int) -> list[Examples]:
    """Holds out validation examples and standardises all images.

    A fifth of the training examples, drawn at random but from each digit alike, become
    the validation examples. All images are shifted and scaled by two numbers, so that
    the pixels of the remaining training images have mean 0 and standard deviation 1.

    Returns:
      Training, validation, and then the other examples, as float32 and int32.
    """
    order = np.random.default_rng(seed).permutation(len(training.labels))
    by_label = order[np.argsort(training.labels[order], kind="stable")]

    def select(indices: np.ndarray) -> Examples:
        return Examples(training.images[indices], training.labels[indices])

    remaining = select(np.delete(by_label, np.s_[::5]))
    mean = remaining.images.mean(dtype=np.float64)
    std = remaining.images.std(dtype=np.float64)
    return [
        Examples(
            jnp.asarray(
                (images - np.float32(mean)) / np.float32(std or 1), jnp.float32
            ),
            jnp.asarray(labels, jnp.int32),
        )
        for images, labels in (remaining, select(by_label[::5]), *others)
    ]


@partial(jax.jit, static_argnames=("optimizer", "num_pixels"))
def create_state(
    optimizer: optax.GradientTransformation, key: jax.Array, num_pixels: int
) -> TrainState:
    """Initial weights and optimizer state."""
    network = Network()
    params = network.init(key, jnp.zeros((1, num_pixels)))
    return TrainState.create(apply_fn=network.apply, params=params, tx=optimizer)


def loss_and_accuracy(
    params: optax.Params, apply_fn: Callable[..., jax.Array], examples: Examples
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and the share of examples classified correctly."""
    logits = apply_fn(params, examples.images)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, examples.labels
    )
    return loss.mean(), (logits.argmax(-1) == examples.labels).mean()


@partial(jax.jit, static_argnames="batch_size")
def train_epoch(
    state: TrainState,
    key: jax.Array,
    training: Examples,
    validation: Examples,
    *,
    batch_size: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One pass over the shuffled training examples, as one compiled program.

    The last, incomplete batch is left out: for example, 29 of 1,437 examples with
    batches of 32. The shuffle chooses them anew in every epoch.

    Returns:
      The new state and the metrics of the epoch: `loss` and `accuracy` are means over
      the training examples, before the step on their batch; `val_loss` and
      `val_accuracy` are measured after the last step.
    """
    num_examples = len(training.labels)
    num_steps = num_examples // batch_size
    shuffle_key = jax.random.fold_in(key, state.step)
    order = jax.random.permutation(shuffle_key, num_examples)

    def step(state, indices):
        batch = Examples(training.images[indices], training.labels[indices])
        metrics, gradients = jax.value_and_grad(loss_and_accuracy, has_aux=True)(
            state.params, state.apply_fn, batch
        )
        return state.apply_gradients(grads=gradients), metrics

    state, (losses, accuracies) = jax.lax.scan(
        step, state, order[: num_steps * batch_size].reshape(num_steps, batch_size)
    )
    loss, accuracy = loss_and_accuracy(state.params, state.apply_fn, validation)
    return state, {
        "loss": losses.mean(),
        "accuracy": accuracies.mean(),
        "val_loss": loss,
        "val_accuracy": accuracy,
    }
