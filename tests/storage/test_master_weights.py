# SPDX-License-Identifier: Apache-2.0
"""bfloat16 and float16 weights with residuals, against float32 and NumPy's float64."""

import functools
import math
import pickle
import re

import chex
import equinox as eqx
import flax.serialization
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import running
from helpers.comparison import assert_same_bits
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

from optax_rms import rmsprop
from optax_rms.storage import _master_weights, _residuals
from optax_rms.storage._compress_state import compress_state
from optax_rms.storage._formats import UE6M2
from optax_rms.storage._master_weights import (
    MasterWeightsState,
    master_weights,
    split_master_weights,
    split_weights,
)
from optax_rms.storage._rounding import rounding_bits

HALVES = [jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)]
SIGNIFICANT_BITS = {HALVES[0]: 8, HALVES[1]: 11}
LOWEST_EXPONENT = {HALVES[0]: -126, HALVES[1]: -14}

half = pytest.mark.parametrize("dtype", HALVES, ids=str)
bits = pytest.mark.parametrize("residual_bits", [8, 16])


def step(tx, params, state, gradients):
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction needs it.
        return running.step(tx, params, state, gradients)


def float64(x):
    with np.errstate(invalid="ignore"):  # Conversion quietens signalling NaNs.
        return np.asarray(x).astype(np.float64)


def spacing(x, dtype):
    """The distance between the numbers of ``dtype`` around ``x``, in float64."""
    exponent = np.frexp(x)[1] - 1
    lowest = np.maximum(exponent, LOWEST_EXPONENT[dtype])
    return np.ldexp(1.0, lowest - (SIGNIFICANT_BITS[dtype] - 1))


def adversarial(dtype, residual_bits, seed):
    """Every weight of ``dtype`` four times, with residuals and float32 changes.

    The changes are arbitrary bit patterns, near cancellations, small fractions and
    simple multiples of the weight, and a few halves of its spacing.
    """
    rng = np.random.default_rng(seed)
    weights = np.tile(np.arange(2**16, dtype=np.uint16), 4).view(dtype)
    n = weights.size
    limit = 2 ** (residual_bits - 1)
    residual = rng.integers(-limit, limit, n)
    residual = np.where(
        rng.random(n) < 0.1, rng.choice([-limit, limit - 1, 0], n), residual
    )
    w = float64(weights)
    residual = np.where(np.isfinite(w), residual, 0)
    w = np.where(np.isfinite(w), w, 0)
    patterns = rng.integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    relative = rng.normal(size=n) * 2.0 ** rng.integers(-30, 1, n)
    with np.errstate(over="ignore", invalid="ignore"):
        kinds = [
            patterns.astype(np.float64),
            -w * (1 + relative),
            w * relative,
            w * rng.choice([-3, -2, -1.5, -1, -0.5, 0, 1, 2], n),
            spacing(w, dtype) * rng.integers(-8, 9, n) / 2,
        ]
        changes = np.choose(rng.integers(0, len(kinds), n), kinds).astype(np.float32)
    residual = residual.astype(np.int8 if residual_bits == 8 else np.int16)
    return jnp.asarray(weights), jnp.asarray(residual), jnp.asarray(changes)


def one_step(weights, residual, changes):
    """Old and new master weights, and new weights, for ``inner`` being the identity."""
    residual_bits = jnp.iinfo(residual.dtype).bits
    tx = split_master_weights(optax.identity(), residual_bits)
    counter = jnp.uint32(5) if residual_bits == 8 else None
    state = MasterWeightsState(counter, residual, optax.EmptyState())
    old = master_weights(weights, state)
    weights, state = step(tx, weights, state, changes)
    return np.asarray(old), master_weights(weights, state), weights


@half
@bits
@pytest.mark.parametrize("own_dtype", [False, True])
def test_parameters_are_the_rounded_master_weights(dtype, residual_bits, own_dtype):
    """For every weight and any change, infinity, NaN and overflow included."""
    weights, residual, changes = adversarial(dtype, residual_bits, seed=1)
    if own_dtype:
        changes = changes.astype(dtype)
    old, new, weights = one_step(weights, residual, changes)
    assert weights.dtype == dtype
    new, rounded = float64(new), float64(weights)
    with np.errstate(over="ignore", invalid="ignore"):
        ideal = (old + np.asarray(changes, np.float32)).astype(np.float32)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(new[~finite], rounded[~finite])
    # Half a step to either side, where a power of 2 has the shorter step below it.
    distance = np.abs(new[finite] - rounded[finite])
    assert np.all(distance <= spacing(new[finite], dtype) / 2)
    np.testing.assert_array_equal(np.isnan(rounded), np.isnan(ideal))
    if not own_dtype:
        # A master weight that rounds to infinity does so in the step that makes it.
        np.testing.assert_array_equal(np.isinf(rounded), beyond(ideal, dtype))


def beyond(x, dtype):
    """Whether float32 ``x`` rounds to an infinity of ``dtype``."""
    largest = float(jnp.finfo(dtype).max)
    return np.abs(float64(x)) >= largest + spacing(largest, dtype) / 2


@half
@bits
@pytest.mark.parametrize("own_dtype", [False, True])
def test_a_step_changes_the_master_weight_as_in_float32(
    dtype, residual_bits, own_dtype
):
    """Exactly, or within the bounds that the docstring gives."""
    weights, residual, changes = adversarial(dtype, residual_bits, seed=2)
    if own_dtype:
        changes = changes.astype(dtype)
    old, new, _ = one_step(weights, residual, changes)
    changes, start = float64(changes), float64(weights)
    with np.errstate(over="ignore", invalid="ignore"):
        ideal = float64((old + changes.astype(np.float32)).astype(np.float32))
    # Away from overflow and from subnormal float32, which XLA flushes to zero.
    low, high = (1e-30, 1e30) if dtype == HALVES[0] else (0, 2.0**14)
    sizes = np.abs([float64(old), changes])
    fair = np.all(((sizes >= low) & (sizes <= high)) | (sizes == 0), axis=0)
    assert fair.mean() > 0.4
    old, changes, start, ideal = (
        x[fair] for x in (float64(old), changes, start, ideal)
    )
    error = np.abs(float64(new)[fair] - ideal)
    if residual_bits == 8:
        # Stochastic rounding goes to either neighbour, so by less than their distance.
        bound = spacing(ideal, dtype) * 2.0**-8
    elif dtype == HALVES[1]:
        bound = np.where(np.abs(ideal) < 2.0**-17, 2.0**-41, 0)
    else:
        bound = np.zeros_like(ideal)
    if own_dtype:
        # Rounding the update to p bits moves the sum by up to 2^-p of the update, and
        # rounding the sum at most doubles that, beyond what the residual can hold. The
        # update is longer than the change by up to 4 * 2^-p, for it starts and ends at
        # rounded weights.
        within_factor_2 = (ideal * start > 0) & (
            np.abs(np.log2(np.abs(ideal / np.where(start, start, 1)) + 1e-300)) < 0.98
        )
        relative = 2 * 2.0 ** -SIGNIFICANT_BITS[dtype] * (1 + 2.0**-5)
        bound += np.where(within_factor_2 | (start == 0), 0, relative * np.abs(changes))
    else:
        cancelled = np.abs(ideal) <= 2.0**-13 * np.abs(old)
        bound += np.where(cancelled, 2.0**-24 * np.abs(changes), 0)
    assert np.all(error <= bound)
    assert np.mean(bound == 0) > 0.2 or residual_bits == 8


@half
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    weight=st.integers(0, 2**16 - 1),
    residual=st.integers(-(2**15), 2**15 - 1),
    change=st.floats(width=32),
)
def test_parameters_and_master_weights_agree_on_any_bits(
    dtype, weight, residual, change
):
    weight = np.uint16(weight).view(dtype)
    residual = np.int16(residual if np.isfinite(weight.astype(np.float32)) else 0)
    _, new, weight = one_step(
        jnp.asarray(weight), jnp.asarray(residual), jnp.float32(change)
    )
    new, weight = float64(new), float64(weight)
    if np.isfinite(weight):
        assert np.abs(new - weight) <= spacing(new, dtype) / 2
    else:
        np.testing.assert_array_equal(new, weight)


def test_a_tie_keeps_all_of_its_residual():
    """Halfway between two weights: rounded away from zero, whichever is even."""
    for weight in (1.0, 1.0 + 2.0**-7, -1.0, -1.0 - 2.0**-7):
        params = jnp.array([weight], jnp.bfloat16)
        tx = split_master_weights(optax.identity(), 16)
        change = jnp.full(1, math.copysign(2.0**-8, weight), jnp.float32)
        params, state = step(tx, params, tx.init(params), change)
        away = math.copysign(2.0**-7, weight)
        assert float(params[0]) == weight + away
        assert float(master_weights(params, state)[0]) == weight + away / 2


INNER = {
    "sgd": optax.sgd(0.003, momentum=0.9, nesterov=True),
    "rmsprop": rmsprop(0.01, momentum=0.9, centered=True),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(1e-3, weight_decay=0.1),
    "lion": optax.lion(1e-3),
    "chain": optax.chain(optax.clip(0.5), optax.trace(0.9), optax.scale(-0.01)),
    "injected": optax.inject_hyperparams(optax.sgd)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 20), momentum=0.9
    ),
    "compressed": compress_state(rmsprop(0.01), nu=UE6M2),
}


def run(tx, params, gradients):
    """The master weights after each step, computed operation by operation.

    Inside one compiled program, XLA contracts a product and a sum to a fused
    multiply-add where it sees fit, so that no two programs agree to the last bit.
    """
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction needs it.
        history = running.run(tx, gradients, params)
    if params.dtype == jnp.float32:
        return history.params
    steps = [running.at(history, t) for t in range(len(gradients))]
    return np.stack([master_weights(after.params, after.state) for after in steps])


@pytest.mark.parametrize("name", INNER)
def test_sixteen_bits_are_a_float32_run_bit_for_bit(name):
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=500), jnp.bfloat16)
    scales = 10.0 ** rng.uniform(-4, 1, 500)
    gradients = jnp.asarray(rng.normal(size=(20, 500)) * scales, jnp.float32)
    split = run(split_master_weights(INNER[name], 16), start, gradients)
    plain = run(INNER[name], start.astype(jnp.float32), gradients)
    np.testing.assert_array_equal(split, plain)
    eight = run(split_master_weights(INNER[name], 8), start, gradients)
    assert not np.array_equal(eight, plain)
    # Each of 20 steps adds a centered error from an interval of at most 2^-15 of the
    # largest weight so far. By Hoeffding's inequality a sum of them is beyond
    # 2^-15 sqrt(20 k / 2) with probability 2 exp(-k): none of 10,000 for k = 17. Since
    # the gradients are given, nothing lets errors grow.
    largest = np.abs(plain).max(axis=0)
    assert np.all(np.abs(eight - plain) <= 2.0**-15 * math.sqrt(20 * 17 / 2) * largest)


def test_float16_is_a_float32_run_bit_for_bit_above_its_subnormals():
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=500), jnp.float16)
    gradients = jnp.asarray(rng.normal(size=(20, 500)), jnp.float32)
    split = run(split_master_weights(optax.sgd(1e-4), 16), start, gradients)
    plain = run(optax.sgd(1e-4), start.astype(jnp.float32), gradients)
    exact = np.abs(plain).min(axis=0) >= 2.0**-17
    assert exact.sum() > 490
    np.testing.assert_array_equal(split[:, exact], plain[:, exact])


@half
def test_steps_far_below_the_last_bit_count_on_average(dtype, monkeypatch):
    """256 steps of 2^-20 of the weight: all lost in bfloat16, and to the nearest."""
    n, steps, length = 4096, 256, 2.0**-20
    signs = np.where(np.arange(n) % 2, -1.0, 1.0)
    start = jnp.asarray(1.25 * signs, dtype)

    def moved(tx):
        def body(carry, _):
            return step(tx, *carry, start), None

        carry, _ = jax.lax.scan(body, (start, tx.init(start)), length=steps)
        return carry

    params, _ = moved(optax.sgd(length))
    np.testing.assert_array_equal(params, start)
    tx = split_master_weights(optax.sgd(length))
    fractions = 1 - float64(master_weights(*moved(tx))) / float64(start)
    # A rounding to neighbours a step apart has variance at most step^2 / 4.
    code = 2.0**-7 if dtype == HALVES[0] else 2.0**-10
    deviation = code * 2.0**-8 / 2 * math.sqrt(steps) / 1.25
    assert abs(np.mean(fractions) - steps * length) < 5 * deviation / math.sqrt(n)
    assert np.std(fractions) < 1.1 * deviation

    # To the nearest instead, which needs the function that is not compiled yet.
    monkeypatch.setattr(_master_weights, "advance", _master_weights.advance.__wrapped__)
    monkeypatch.setattr(_residuals, "rounding_bits", lambda *_: jnp.uint32(2**31))
    np.testing.assert_array_equal(master_weights(*moved(tx)), float64(start))


@half
@bits
def test_a_zero_step_changes_nothing(dtype, residual_bits):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=1000), dtype)
    tx = split_master_weights(optax.sgd(0.01), residual_bits)
    state = tx.init(params)
    params, state = step(tx, params, state, jnp.asarray(rng.normal(size=1000), dtype))
    assert np.any(np.asarray(state.residual) != 0)
    still, after = step(tx, params, state, jnp.zeros_like(params))
    np.testing.assert_array_equal(still, params)
    np.testing.assert_array_equal(
        master_weights(still, after), master_weights(params, state)
    )


def test_rounding_noise_is_not_shared():
    """Neither by leaves nor by steps, nor with moments that `compress_state` rounds."""
    params = [jnp.ones(4096, jnp.bfloat16)] * 2
    tx = split_master_weights(optax.sgd(2.0**-18))
    fresh = state = tx.init(params)
    # Below 1 codes are 2^-16 apart: a step of 2^-18 moves a quarter of the weights.
    moved = [rounding_bits((4096,), step, 0) >> 24 >= 192 for step in range(3)]
    for _ in range(2):
        state = state._replace(residual=fresh.residual)
        _, state = step(tx, params, state, params)
        moved += [r != 0 for r in state.residual]
    moved = np.asarray(moved)
    deviation = math.sqrt(1 / 4 * 3 / 4 / 4096)
    np.testing.assert_allclose(moved.mean(axis=1), 1 / 4, rtol=0, atol=5 * deviation)
    both = np.mean(moved[:, None] & moved, axis=2)[np.triu_indices(len(moved), 1)]
    deviation = math.sqrt(1 / 16 * 15 / 16 / 4096)
    np.testing.assert_allclose(both, 1 / 16, rtol=0, atol=5 * deviation)


@half
@bits
def test_given_weights_are_split_and_come_back(dtype, residual_bits):
    """Every exponent and both signs; bit for bit where the docstring says so."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    special = [0.0, -0.0, np.inf, -np.inf, 65504, -65504, 1 - 2.0**-24, 2.0**-149]
    halfway = [1 + 2.0**-8, 1 + 2.0**-9, -1 - 2.0**-11, 1 + 2.0**-16, 3.3895e38]
    wide = np.concatenate([patterns.view(np.float32), np.float32(special + halfway)])
    wide = {"w": jnp.asarray(wide), "b": jnp.ones(3), "n": jnp.arange(3)}
    params = {**wide, "w": wide["w"].astype(dtype)}
    tx = split_master_weights(optax.identity(), residual_bits)
    params, state = split_weights(wide, params, tx.init(params))
    assert params["w"].dtype == dtype
    assert_same_bits({"b": params["b"], "n": params["n"]}, {k: wide[k] for k in "bn"})
    x, back = np.asarray(wide["w"]), np.asarray(master_weights(params, state)["w"])
    nearest = float64(params["w"])
    np.testing.assert_array_equal(np.isnan(back), np.isnan(x))
    np.testing.assert_array_equal(np.isinf(back), beyond(x, dtype))
    finite = np.isfinite(back)
    x, back, nearest = x[finite], back[finite], nearest[finite]
    np.testing.assert_array_equal(np.signbit(back), np.signbit(x))
    # Rounding to multiples of 2^-8 or 2^-16 of the spacing, or of float32's own.
    if residual_bits == 16 and dtype == HALVES[0]:
        assert x.tobytes() == back.tobytes()
    else:
        unit = spacing(x.astype(np.float64), dtype) * 2.0**-residual_bits
        # A float16 below 2^-14 is rounded to a multiple of 2^-40 first.
        assert np.all(np.abs(float64(back) - x) <= unit / 2 + 2.0**-41)
        exact = np.abs(x) >= 2.0**-17
        if residual_bits == 16:
            np.testing.assert_array_equal(back[exact], x[exact])
        else:
            assert np.any(back[exact] != x[exact])
    # And the parameter is the nearest number, half a residual's unit aside.
    distance = np.abs(float64(back) - nearest)
    assert np.all(distance <= spacing(float64(back), dtype) / 2)


def test_a_float32_run_goes_on_with_split_weights_bit_for_bit():
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=(10, 200)), jnp.float32)
    inner = rmsprop(0.01, momentum=0.9)
    weights = jnp.asarray(rng.normal(size=200), jnp.float32)
    float32_state = inner.init(weights)
    for g in gradients[:5]:
        weights, float32_state = step(inner, weights, float32_state, g)
    tx = split_master_weights(inner, 16)
    params = weights.astype(jnp.bfloat16)
    params, state = split_weights(weights, params, tx.init(params))
    state = state._replace(inner_state=float32_state)
    for g in gradients[5:]:
        weights, float32_state = step(inner, weights, float32_state, g)
        params, state = step(tx, params, state, g)
    assert_same_bits(master_weights(params, state), weights)
    # And back.
    assert_same_bits(state.inner_state, float32_state)


def test_weights_are_split_in_every_part_of_a_state():
    weights = {k: jnp.full(3, 1 + 2.0**-20) for k in "abc"}
    params = {k: w.astype(jnp.bfloat16) for k, w in weights.items()}
    parts = {
        "eight": split_master_weights(optax.sgd(0.1), 8),
        "sixteen": split_master_weights(optax.sgd(0.1), 16),
        "plain": optax.sgd(0.1),
    }
    tx = optax.partition(parts, {"a": "eight", "b": "sixteen", "c": "plain"})
    state = tx.init(params)
    weights["c"] = params["c"]
    new_params, state = split_weights(weights, params, state)
    masters = master_weights(new_params, state)
    np.testing.assert_array_equal(masters["a"], np.ones(3))
    np.testing.assert_array_equal(masters["b"], weights["b"])
    assert masters["c"].dtype == jnp.bfloat16
    bad = {"a": jnp.ones(2), "b": params["b"], "c": jnp.ones(3)}
    message = (
        r"\['a'\] is float32\(2,\), not float32\(3,\); \['b'\] is bfloat16.*, not "
        r"float32\(3,\); \['c'\] is float32"
    )
    with pytest.raises(ValueError, match=message):
        split_weights(bad, params, state)
    with pytest.raises(ValueError, match="structure of master_weights"):
        split_weights({"a": bad["a"]}, params, state)
    with pytest.raises(ValueError, match="found none in a EmptyState"):
        split_weights(weights, params, optax.EmptyState())


@pytest.mark.slow
def test_split_weights_learn_where_bfloat16_stalls():
    """A network of 64 tanh units on the digits, all its weights in one vector."""
    images, labels = (jnp.asarray(x) for x in load_digits(return_X_y=True))
    images = images.astype(jnp.float32) / 16
    start = (
        jax.random.normal(jax.random.key(0), 64 * 64 + 64 * 10).astype(jnp.bfloat16) / 8
    )
    batches = jax.random.randint(jax.random.key(1), (300, 32), 0, len(labels))

    def loss(weights, batch=slice(None)):
        w1, w2 = jnp.split(weights.astype(jnp.float32), [64 * 64])
        logits = jnp.tanh(images[batch] @ w1.reshape(64, 64)) @ w2.reshape(64, 10)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, labels[batch]
        ).mean()

    def train(tx, weights):
        def body(carry, batch):
            return step(tx, *carry, jax.grad(loss)(carry[0], batch)), None

        return jax.lax.scan(body, (weights, tx.init(weights)), batches)[0]

    tx = rmsprop(1e-4)
    wide, _ = train(tx, start.astype(jnp.float32))
    plain, _ = train(tx, start)
    split, state = train(split_master_weights(tx), start)
    descent = loss(start) - loss(wide)
    lost = loss(plain) - loss(wide)
    # Measured: descent 0.521, lost 0.317, split weights 0.00002 and 0.0001 off.
    assert lost > 0.3 * descent
    assert abs(loss(master_weights(split, state)) - loss(wide)) < 0.01 * lost
    assert abs(loss(split) - loss(wide)) < 0.01 * lost


def persistent_bytes(*trees):
    """Bytes in the buffers of arrays with more than one element."""
    arrays = [x for x in jax.tree.leaves(trees) if x.size > 1]
    return sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards)


@half
def test_bytes_per_parameter(dtype):
    n = 10_000
    params = {"w": jnp.ones((n // 10, 10), dtype)}
    for residual_bits, inner, expected in (
        (8, optax.sgd(0.1), 3),
        (16, optax.sgd(0.1), 4),
        (8, rmsprop(0.1), 7),
        (8, compress_state(rmsprop(0.1), nu=UE6M2), 4),
    ):
        tx = split_master_weights(inner, residual_bits)
        state = tx.init(params)
        assert persistent_bytes(params, state) == expected * n
        assert persistent_bytes(*step(tx, params, state, params)) == expected * n


MIXED = {
    "half": [jnp.array([1.5, -2.0, 0.0], jnp.bfloat16), jnp.array(3.0, jnp.float16)],
    "wide": jnp.array([[1.0, 2.0]], jnp.float32),
    "complex": jnp.array([1 + 2j], jnp.complex64),
    "empty": jnp.zeros((0, 4), jnp.bfloat16),
    "none": None,
    "masked": optax.MaskedNode(),
}


@bits
def test_any_tree_keeps_its_structure_shapes_and_dtypes(residual_bits):
    tx = split_master_weights(rmsprop(0.1, momentum=0.9), residual_bits)
    state = tx.init(MIXED)
    gradients = jax.tree.map(jnp.ones_like, MIXED)
    updates, new_state = tx.update(gradients, state, MIXED)
    chex.assert_trees_all_equal_structs(updates, MIXED)
    for tree, like in ((updates, gradients), (new_state, state)):
        chex.assert_trees_all_equal_structs(tree, like)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
    wide = master_weights(optax.apply_updates(MIXED, updates), new_state)
    assert [x.dtype for x in jax.tree.leaves(wide["half"])] == [jnp.float32] * 2
    assert wide["complex"].dtype == jnp.complex64
    empty = split_master_weights(optax.identity(), residual_bits)
    assert empty.update({}, empty.init({}), {})[0] == {}


def test_wide_leaves_pass_through():
    wide = {k: MIXED[k] for k in ("wide", "complex")}
    tx, inner = split_master_weights(rmsprop(0.1)), rmsprop(0.1)
    updates, state = tx.update(wide, tx.init(wide), wide)
    assert_same_bits(updates, inner.update(wide, inner.init(wide))[0])
    assert_same_bits(master_weights(wide, state), wide)


def test_float64_leaves_pass_through():
    jax.config.update("jax_enable_x64", True)
    try:
        tx = split_master_weights(rmsprop(0.1))
        params = [jnp.ones(3, jnp.float64), jnp.ones(3, jnp.bfloat16)]
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        assert [u.dtype for u in updates] == [jnp.float64, jnp.bfloat16]
        for tree in (state, after):
            assert tree.residual[0] == optax.MaskedNode()
            assert tree.residual[1].dtype == jnp.int8
            assert master_weights(params, tree)[1].dtype == jnp.float32
    finally:
        jax.config.update("jax_enable_x64", False)


def test_a_missing_gradient_keeps_weight_and_residual():
    params = [jnp.ones(3, jnp.bfloat16)] * 3
    gradient = jnp.full(3, 2.0**-12, jnp.bfloat16)
    tx = split_master_weights(optax.scale(-1.0), 16)
    _, state = tx.update([gradient] * 3, tx.init(params), params)
    assert np.all(np.asarray(state.residual[1]) != 0)
    gradients = [None, gradient, optax.MaskedNode()]
    updates, after = tx.update(gradients, state, params)
    assert updates[0] is None
    assert updates[2] == optax.MaskedNode()
    np.testing.assert_array_equal(after.residual[0], state.residual[0])
    np.testing.assert_array_equal(after.residual[2], state.residual[2])
    np.testing.assert_array_equal(after.residual[1], 2 * state.residual[1])


def test_inner_sees_gradients_weights_and_state_in_float32():
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append((updates, state, params, value))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: params, update)
    tx = split_master_weights(inner)
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    tx.update(params, tx.init(params), params, value=7)
    *trees, value = seen.pop()
    assert value == 7
    assert {x.dtype for x in jax.tree.leaves(trees)} == {jnp.dtype(jnp.float32)}


def test_weight_decay_acts_on_the_master_weights():
    """1e-5 a step, invisible in bfloat16."""
    start = jnp.ones(1000, jnp.bfloat16)
    tx = split_master_weights(optax.adamw(1e-3, weight_decay=1e-2))

    def body(carry, _):
        return step(tx, *carry, jnp.zeros_like(start)), None

    carry, _ = jax.lax.scan(body, (start, tx.init(start)), length=1000)
    # The standard error of the mean: 1000 roundings of at most 2^-16 / 2 each, of 1000.
    expected = (1 - 1e-5) ** 1000
    assert abs(float(master_weights(*carry).mean()) - expected) < 5 * 2.0**-17


def test_masked_and_partitioned_parameters():
    params = {k: jnp.full(3, 2.0, jnp.bfloat16) for k in "abc"}
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 2.0**-9), params)
    inner = {
        "eight": split_master_weights(optax.scale(-1.0), 8),
        "sixteen": split_master_weights(optax.scale(-1.0), 16),
        "plain": optax.scale(-1.0),
    }
    tx = optax.partition(inner, {"a": "eight", "b": "sixteen", "c": "plain"})
    params, state = step(tx, params, tx.init(params), gradients)
    masters = master_weights(params, state)
    for k in "ab":
        np.testing.assert_array_equal(masters[k], np.full(3, 2 - 2.0**-9))
    assert masters["c"].dtype == jnp.bfloat16

    masked = optax.masked(inner["sixteen"], {"a": True, "b": False, "c": False})
    _, state = step(masked, params, masked.init(params), gradients)
    dtypes = {k: w.dtype for k, w in master_weights(params, state).items()}
    assert dtypes == {"a": jnp.float32, "b": jnp.bfloat16, "c": jnp.bfloat16}


def test_wrappers_on_either_side():
    """Skipped and accumulated steps leave weights and residuals alone."""
    start = jnp.full(3, 2.0, jnp.bfloat16)
    gradient = jnp.full(3, 2.0**-12, jnp.bfloat16)
    inner = optax.scale(-1.0)
    mean_of_2 = optax.MultiSteps(inner, 2).gradient_transformation()
    for tx, gradients, steps in (
        (optax.apply_if_finite(split_master_weights(inner, 16), 5), [1, jnp.inf], 1),
        (split_master_weights(optax.apply_if_finite(inner, 5), 16), [1, jnp.inf], 1),
        (optax.MultiSteps(split_master_weights(inner, 16), 2), [1, 3, 5], 2),
        (split_master_weights(mean_of_2, 16), [1, 3, 5], 2),
    ):
        params, state = start, tx.init(start)
        for factor in gradients:
            params, state = step(tx, params, state, factor * gradient)
        moved = 2 - master_weights(params, state)
        np.testing.assert_array_equal(moved, np.full(3, steps * 2.0**-12))


def test_flax_and_equinox_apply_the_updates():
    params = {"w": jnp.array([1.0, -3.0], jnp.bfloat16)}
    gradients = {"w": jnp.full(2, 2.0**-7, jnp.bfloat16)}
    tx = split_master_weights(optax.sgd(1.0), 16)
    train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
    model, state = params, tx.init(params)
    for _ in range(3):
        train_state = train_state.apply_gradients(grads=gradients)
        updates, state = tx.update(gradients, state, model)
        model = eqx.apply_updates(model, updates)
    assert_same_bits(model, train_state.params)
    moved = params["w"].astype(jnp.float32) - master_weights(model, state)["w"]
    np.testing.assert_array_equal(moved, np.full(2, 3 * 2.0**-7))


def test_master_weights_of_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    params = nnx.state(model, nnx.Param)
    before = nnx.to_pure_dict(params)
    tx = split_master_weights(optax.sgd(2.0**-12), 16)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    params = nnx.state(model, nnx.Param)
    after = nnx.to_pure_dict(master_weights(params, optimizer.opt_state))
    for name, value in before.items():
        expected = value.astype(jnp.float32) - 2.0**-12
        np.testing.assert_array_equal(after[name], expected)


@bits
def test_jit_scan_and_donation_give_the_same_bits(residual_bits):
    """The learning rate is a power of 2: multiply-add rounds as multiply, then add."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(33, 7)), jnp.bfloat16)}
    stream = {"w": jnp.asarray(rng.normal(size=(6, 33, 7)), jnp.bfloat16)}
    tx = split_master_weights(optax.sgd(2.0**-6), residual_bits)
    steps = [jax.tree.map(lambda g, t=t: g[t], stream) for t in range(6)]

    eager = params, tx.init(params)
    for gradients in steps:
        eager = step(tx, *eager, gradients)
    donated = jax.tree.map(jnp.copy, params), tx.init(params)
    compiled = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
    for gradients in steps:
        donated = compiled(*donated, gradients)
    scanned, _ = jax.lax.scan(
        lambda carry, gradients: (step(tx, *carry, gradients), None),
        (params, tx.init(params)),
        stream,
    )
    assert_same_bits(donated, eager)
    assert_same_bits(scanned, eager)


def test_vmap_over_learning_rates():
    params = jnp.array([1.0, 2.0], jnp.bfloat16)
    gradient = jnp.array([1.0, -1.0], jnp.bfloat16)
    rates = 2.0 ** -jnp.arange(4.0, 20.0)

    def train(rate):
        tx = split_master_weights(optax.sgd(rate), 16)
        return master_weights(*step(tx, params, tx.init(params), gradient))

    expected = np.asarray(params, np.float32) - np.outer(rates, gradient)
    np.testing.assert_array_equal(jax.vmap(train)(rates), expected)


@bits
def test_the_same_bits_on_one_device_and_on_eight_without_collectives(residual_bits):
    rng = np.random.default_rng(0)
    shape = (16, 24)
    params = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    gradient = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    tx = split_master_weights(optax.sgd(2.0**-9, momentum=0.5), residual_bits)
    compiled = jax.jit(functools.partial(step, tx))
    alone = compiled(*compiled(params, tx.init(params), gradient), gradient)
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    params, gradient = jax.device_put((params, gradient), sharding)
    state = tx.init(params)
    assert state.residual.sharding == sharding
    spread = compiled(*compiled(params, state, gradient), gradient)
    assert spread[0].sharding == spread[1].residual.sharding == sharding
    assert_same_bits(spread, alone)
    program = compiled.lower(*spread, gradient).compile().as_text()
    collective = r"(all-gather|all-reduce|all-to-all|permute|reduce-scatter)(-start)?\("
    assert not re.search(collective, program)


@bits
def test_tree_map_params_finds_the_residuals(residual_bits):
    tx = split_master_weights(optax.sgd(0.1, momentum=0.9), residual_bits)
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    state = optax.tree_map_params(
        tx,
        lambda value, name: name,
        tx.init(params),
        {"w": "spec of w", "b": "spec of b"},
        transform_non_params=lambda _: "other",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert state.residual == {"w": "spec of w", "b": "spec of b"}
    assert state.inner_state[0].trace == {"w": "spec of w", "b": "spec of b"}
    assert state.rounding_step == ("other" if residual_bits == 8 else None)


@bits
def test_checkpoints_resume_with_the_same_bits(residual_bits, tmp_path):
    tx = split_master_weights(rmsprop(0.01), residual_bits)
    params = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    trained = step(tx, params, tx.init(params), params)
    blank = params, tx.init(params)
    pickled = pickle.loads(pickle.dumps(trained))
    raw = flax.serialization.to_bytes(trained)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", trained)
        checkpointer.wait_until_finished()
        saved = checkpointer.restore(tmp_path / "state", blank)
    gradients = jax.tree.map(lambda p: p / 2, params)
    expected = step(tx, *trained, gradients)
    for restored in (pickled, flax.serialization.from_bytes(blank, raw), saved):
        restored = jax.tree.map(jnp.asarray, restored)
        assert_same_bits(step(tx, *restored, gradients), expected)


def test_each_shape_and_dtype_is_traced_once(monkeypatch):
    traced = []

    def bits_of_zero(shape, *numbers):
        traced.append(shape)
        return jnp.zeros(shape, jnp.uint32)

    monkeypatch.setattr(_residuals, "rounding_bits", bits_of_zero)
    # Shapes of no other test, since compiled code is kept.
    params = [jnp.ones((n, 5, 3), jnp.bfloat16) for n in (1, 2, 2, 1, 2)]
    for _ in range(2):  # Transformations built alike share the compiled code.
        tx = split_master_weights(optax.sgd(0.1))
        params, state = step(tx, params, tx.init(params), params)
        step(tx, params, state, params)
    assert traced == [(1, 5, 3), (2, 5, 3)]


def test_bad_input_is_named():
    tx = split_master_weights(optax.sgd(0.1))
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    state = tx.init(params)
    with pytest.raises(ValueError, match="residual_bits must be 8 or 16, got 4"):
        split_master_weights(optax.sgd(0.1), residual_bits=4)
    integers = {"w": jnp.ones(3, jnp.int32), "z": jnp.ones(3, bool)}
    with pytest.raises(TypeError, match=r"\['w'\] \(int32\), \['z'\] \(bool\)"):
        tx.update(integers, tx.init(integers), integers)
    with pytest.raises(TypeError, match=r"arrays or numbers.*\['w'\] \(str\)"):
        tx.init({"w": "weights"})
    with pytest.raises(TypeError, match=r"narrower: \['w'\] \(float8_e4m3fn\)"):
        tx.init({"w": jnp.ones(3, jnp.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
        tx.update(params, state)
    with pytest.raises(TypeError, match="MasterWeightsState that its init returns"):
        tx.update(params, optax.EmptyState(), params)
    with pytest.raises(ValueError, match=r"\['w'\]: .*gradient bfloat16\(2,\)"):
        tx.update({**params, "w": jnp.ones(2, jnp.bfloat16)}, state, params)
    wide = {"w": jnp.ones(3, jnp.float32), "b": jnp.ones(2, jnp.bfloat16)}
    for name in wide:
        with pytest.raises(
            ValueError, match=rf"\['{name}'\]: parameter {wide[name].dtype}"
        ):
            tx.update(params, state, wide)
    with pytest.raises(ValueError, match=r"\['w'\]: parameter float32\(3,\)"):
        master_weights(wide, state)
    with pytest.raises(ValueError, match="found none in a EmptyState"):
        master_weights(params, optax.EmptyState())
