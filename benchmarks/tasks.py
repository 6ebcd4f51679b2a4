# SPDX-License-Identifier: Apache-2.0
"""Three small problems to train: two networks that read digits, one that reads text."""

import pydoc_data.topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CONTEXT = 8


class Examples(NamedTuple):
    """Inputs `[n, ...]` and the class of each `[n]`."""

    inputs: Any
    labels: Any


class Task(NamedTuple):
    """A network with its training set and its validation set."""

    network: nn.Module
    training: Examples
    validation: Examples

    def init(self, key: jax.Array) -> Any:
        return self.network.init(key, self.training.inputs[:1])

    def loss_and_accuracy(self, params: Any, examples: Examples) -> tuple[Any, Any]:
        logits: Any = self.network.apply(params, examples.inputs)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, examples.labels
        )
        return losses.mean(), jnp.mean(logits.argmax(-1) == examples.labels)


class Convolution(nn.Module):
    """3x3, to `features` channels, ReLU, and the largest of each 2x2.

    A product of patches, and a maximum over axes: XLA on the CPU is slow with
    convolutions and windows if `jax.vmap` adds a network axis to them.
    """

    features: int

    @nn.compact
    def __call__(self, images):
        height, width = images.shape[1:3]
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [
            padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
        ]
        x = nn.relu(nn.Dense(self.features)(jnp.concatenate(patches, axis=-1)))
        return x.reshape(-1, height // 2, 2, width // 2, 2, x.shape[-1]).max((2, 4))


class NextCharacter(nn.Module):
    """From the codes of the last characters to logits of the next (Bengio, 2003)."""

    vocabulary: int

    @nn.compact
    def __call__(self, codes):
        embed = nn.Dense(16, use_bias=False)
        x = embed(jax.nn.one_hot(codes, self.vocabulary))
        x = nn.relu(nn.Dense(128)(x.reshape(len(codes), -1)))
        return nn.Dense(self.vocabulary)(x)


def digits_network() -> Task:
    """A dense layer of 128 units: 9,610 weights."""
    return Task(nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)]), *_digits())


def convolutional_network() -> Task:
    """Two convolutions, of 8 and 16 channels, and a dense layer: 1,898 weights."""
    training, validation = (
        Examples(examples.inputs.reshape(-1, 8, 8, 1), examples.labels)
        for examples in _digits()
    )
    flatten = lambda x: x.reshape(len(x), -1)  # noqa: E731
    layers = [Convolution(8), Convolution(16), flatten, nn.Dense(10)]
    return Task(nn.Sequential(layers), training, validation)


def character_model() -> Task:
    """A character from the 8 before it, in Python's reference: about 30,000 weights."""
    text = "".join(pydoc_data.topics.topics.values())[:120_000]
    alphabet, codes = np.unique(list(text), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)
    windows = jnp.asarray(windows, jnp.int32)
    examples = Examples(windows[:, :-1], windows[:, -1])
    # The end of the text: validation windows share no characters with training.
    training, validation = (
        jax.tree.map(lambda x, part=part: x[part], examples)
        for part in (np.s_[:-10_000], np.s_[-10_000 + CONTEXT :: 5])
    )
    return Task(NextCharacter(len(alphabet)), training, validation)


TASKS = {
    "digits": digits_network,
    "convolution": convolutional_network,
    "characters": character_model,
}


def _digits() -> tuple[Examples, Examples]:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images / 16, labels, test_size=0.2, stratify=labels, random_state=0
    )
    x, x_validation, y, y_validation = split
    return (
        Examples(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)),
        Examples(
            jnp.asarray(x_validation, jnp.float32), jnp.asarray(y_validation, jnp.int32)
        ),
    )
