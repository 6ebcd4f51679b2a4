# SPDX-License-Identifier: Apache-2.0
"""Percentiles of the effective learning rate, by a fixed logarithmic histogram."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from optax_rms._numerics import widen

# Eight bins in each octave from 2^-64 to 2^64, by the leading bits of a float32; the
# first and the last take what is beyond.
_BIN_SHIFT = 20
_FIRST_BIN = (127 - 64) << 3
_NUM_BINS = 128 << 3
_MOST_SAMPLES = 1 << 12

PERCENTS = (1, 50, 99)


def effective_rates(
    gradients: list[jax.Array], updates: list[jax.Array], axes: list[int | None]
) -> jax.Array:
    """The percentiles of |update| / |gradient| of each leaf or layer, and of all.

    Args:
      gradients: of each leaf.
      updates: of each leaf.
      axes: the axis of the layers of each leaf, or ``None``.

    Returns:
      Float32 ``[rows + 1, 3]``, the last row of all leaves together.
    """
    histograms = [
        jnp.atleast_2d(_histogram(g, u, layer_axis=axis))
        for g, u, axis in zip(gradients, updates, axes, strict=True)
    ]
    empty = jnp.zeros((0, _NUM_BINS), jnp.float32)
    rows = jnp.concatenate([empty, *histograms])
    whole = jnp.sum(rows, 0, keepdims=True)
    return _percentiles(jnp.concatenate([rows, whole]))


def _percentiles(histograms: jax.Array) -> jax.Array:
    """Those of NumPy's method ``inverted_cdf``, each as the middle of its bin.

    The first bin stands for 0. NaN if there is nothing in any bin.
    """
    below = jnp.cumsum(histograms, axis=-1)
    total = below[:, -1:]
    bins = [jnp.argmax(100 * below >= percent * total, -1) for percent in PERCENTS]
    bins = jnp.stack(bins, -1).astype(jnp.uint32)
    middles = jax.lax.bitcast_convert_type(
        ((bins + _FIRST_BIN) << _BIN_SHIFT) + (1 << (_BIN_SHIFT - 1)), jnp.float32
    )
    return jnp.where(total == 0, jnp.nan, jnp.where(bins == 0, 0, middles))


@functools.partial(jax.jit, static_argnames="layer_axis")
def _histogram(
    gradient: jax.Array, update: jax.Array, *, layer_axis: int | None
) -> jax.Array:
    """How many |u| / |g| are in each bin, of a sample if there are many, as float32.

    Where the gradient is 0 there is no ratio, and a ratio that is not finite has no
    bin. Counts of a sample are scaled to all elements.
    """
    slices = _sample(gradient.shape, layer_axis)
    g, u = (jnp.abs(widen(x[slices])) for x in (gradient, update))
    ratio = u.astype(jnp.float32) / g.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.uint32)
    bins = (bits >> _BIN_SHIFT).astype(jnp.int32) - _FIRST_BIN
    bins = jnp.clip(bins, 0, _NUM_BINS - 1)
    # Out of bounds, and so dropped.
    bins = jnp.where(jnp.isfinite(ratio), bins, _NUM_BINS)
    if layer_axis is None:
        counts = jnp.zeros(_NUM_BINS, jnp.uint32).at[bins].add(1, mode="drop")
    else:
        rows = jax.lax.broadcasted_iota(jnp.int32, bins.shape, layer_axis)
        counts = jnp.zeros((gradient.shape[layer_axis], _NUM_BINS), jnp.uint32)
        counts = counts.at[rows, bins].add(1, mode="drop")
    return counts.astype(jnp.float32) * np.float32(gradient.size / max(ratio.size, 1))


def _sample(shape: tuple[int, ...], layer_axis: int | None) -> tuple[slice, ...]:
    """Slices with at most 4,096 elements per layer, at equal distances on each axis.

    Steps are odd, so that they fall into every residue of the powers of two in which
    heads and channels are laid out. Each axis keeps its sharding.
    """
    steps = [1] * len(shape)

    def left() -> list[int]:
        axes = enumerate(zip(shape, steps, strict=True))
        return [1 if i == layer_axis else -(-n // step) for i, (n, step) in axes]

    while math.prod(left()) > _MOST_SAMPLES:
        steps[max(range(len(shape)), key=left().__getitem__)] += 2
    return tuple(slice(None, None, step) for step in steps)
