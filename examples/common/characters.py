# SPDX-License-Identifier: Apache-2.0
"""Text that comes with Python, and a small transformer that predicts its characters."""

import pydoc_data.topics
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

CONTEXT = 64
BATCH_SIZE = 16


class Text(NamedTuple):
    """Characters as numbers from 0 to `vocabulary` - 1.

    Attributes:
      training: the first 95 % of the text, `[n]`.
      validation: windows of the rest, `[n, CONTEXT + 1]`.
      vocabulary: number of different characters.
    """

    training: jax.Array
    validation: jax.Array
    vocabulary: int


def load() -> Text:
    """The language reference that `help()` shows, which the standard library holds."""
    text = "\n".join(pydoc_data.topics.topics.values())
    alphabet, codes = np.unique(list(text), return_inverse=True)
    training, validation = np.split(codes.astype(np.int32), [len(codes) * 19 // 20])
    whole_windows = len(validation) // (CONTEXT + 1) * (CONTEXT + 1)
    windows = validation[:whole_windows].reshape(-1, CONTEXT + 1)[::4]
    return Text(jnp.asarray(training), jnp.asarray(windows), len(alphabet))


class Block(nn.Module):
    """Causal attention and a hidden layer, each added to its input."""

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        mask = nn.make_causal_mask(x[..., 0])
        attend = nn.MultiHeadDotProductAttention(
            num_heads=4, use_bias=False, dtype=jnp.float32
        )
        x += attend(_norm()(x), mask=mask)
        hidden = nn.gelu(_dense(4 * width)(_norm()(x)))
        return x + _dense(width)(hidden)


class Transformer(nn.Module):
    """Logits of each next character, computed in float32 for weights of any dtype."""

    vocabulary: int
    width: int
    depth: int

    @nn.compact
    def __call__(self, codes):
        embed = partial(nn.Embed, features=self.width, dtype=jnp.float32)
        x = embed(self.vocabulary)(codes)
        x += embed(CONTEXT)(jnp.arange(codes.shape[-1]))
        for _ in range(self.depth):
            x = Block()(x)
        return _dense(self.vocabulary)(_norm()(x))


_dense = partial(nn.Dense, use_bias=False, dtype=jnp.float32)
_norm = partial(nn.RMSNorm, dtype=jnp.float32)


def loss(params: Any, network: Transformer, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the characters, in nats."""
    logits: Any = network.apply(params, windows[:, :-1])
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, windows[:, 1:]
    ).mean()


def batch(key: jax.Array, text: jax.Array) -> jax.Array:
    """Windows that begin anywhere, `[batch, CONTEXT + 1]`."""
    starts = jax.random.randint(key, (BATCH_SIZE, 1), 0, len(text) - CONTEXT)
    return text[starts + jnp.arange(CONTEXT + 1)]
