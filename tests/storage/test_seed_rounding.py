# SPDX-License-Identifier: Apache-2.0
"""The rounding noise of the members of an ensemble."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_rms import (
    UE6M2,
    compress_state,
    master_weights,
    seed_rounding,
    split_master_weights,
)
from optax_rms.storage._rounding import rounding_bits

MEMBERS, ELEMENTS = 64, 4096


def errors_of_averages(seeded):
    """Errors of a moving average of squares in one byte, for members of an ensemble."""
    tx = compress_state(optax.scale_by_rms(0.9), nu=UE6M2)
    exact = optax.scale_by_rms(0.9)
    stream = np.random.default_rng(0).normal(size=(20, ELEMENTS)).astype(np.float32)

    def run(tx, state):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, stream)[0]

    def member(i):
        state = tx.init(jnp.zeros(ELEMENTS))
        return run(tx, seed_rounding(state, i) if seeded else state)

    codes = jax.vmap(member)(jnp.arange(MEMBERS)).inner_state.nu
    expected = np.asarray(run(exact, exact.init(jnp.zeros(ELEMENTS))).nu, np.float64)
    return np.asarray(UE6M2.decode(codes), np.float64) / expected - 1


def errors_of_weights(seeded):
    """Errors of weights with residuals of 8 bits after steps of 2^-18."""
    tx = split_master_weights(optax.sgd(2.0**-18))
    start = jnp.ones(ELEMENTS, jnp.bfloat16)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(start, state, params)
        return (params + updates, state), None

    def member(i):
        state = tx.init(start)
        carry = start, seed_rounding(state, i) if seeded else state
        return master_weights(*jax.lax.scan(body, carry, length=20)[0])

    weights = jax.vmap(member)(jnp.arange(MEMBERS))
    return np.asarray(weights, np.float64) - (1 - 20 * 2.0**-18)


@pytest.mark.parametrize("errors_of", [errors_of_averages, errors_of_weights])
def test_the_errors_of_64_members_are_independent(errors_of):
    """The mean of n independent errors has 1/n of the variance of one."""
    errors = errors_of(seeded=True)
    ratio = np.var(errors.mean(axis=0)) / np.var(errors)
    # A variance of k independent numbers has the relative standard deviation
    # sqrt(2 / k) if they are normal, as means of 64 are: five of them.
    tolerance = 5 * np.sqrt(2 / ELEMENTS)
    assert abs(ratio * MEMBERS - 1) < tolerance
    correlations = np.corrcoef(errors)[np.triu_indices(MEMBERS, 1)]
    # 2,016 correlations of 4,096 pairs: none is beyond 6 standard deviations.
    assert np.abs(correlations).max() < 6 / np.sqrt(ELEMENTS)
    # Without numbers, all members have the same errors.
    shared = errors_of(seeded=False)
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[0], shared.shape))


def test_members_are_no_copies_of_each_other_at_another_time():
    """The start of the sequence of each member and step occurs once."""
    members, steps = jnp.meshgrid(jnp.arange(64), jnp.arange(1000))
    first = jax.vmap(lambda m, t: rounding_bits((), t, 0, seed=m))(
        members.ravel(), steps.ravel()
    )
    # Of 64,000 random words of 32 bits, n^2 / 2^33 = 0.5 pairs are equal on average,
    # and more than 8 with probability below 1e-8 (Poisson). A shift in time would make
    # thousands.
    assert first.size - np.unique(np.asarray(first)).size <= 8


def test_without_a_number_the_bits_are_those_of_version_0_1():
    bits = rounding_bits((2, 3), step=5, leaf=7)
    expected = [
        [0xA8ECC05E, 0xB6D5CD7E, 0xFCC6A4A7],
        [0x2DAE58EB, 0xAEA32821, 0x7875BD9D],
    ]
    np.testing.assert_array_equal(bits, np.array(expected, np.uint32))


def test_every_state_inside_is_seeded_from_inside_and_outside_of_vmap():
    inner = compress_state(optax.scale_by_rms(), nu=UE6M2)
    tx = optax.chain(split_master_weights(inner), optax.identity())
    params = jnp.ones((3, 2), jnp.bfloat16)
    numbers = jnp.array([4, 5, 6])
    outside = seed_rounding(jax.vmap(tx.init)(params), numbers)
    inside = jax.vmap(lambda p, i: seed_rounding(tx.init(p), i))(params, numbers)
    chex.assert_trees_all_equal_structs(outside, inside)
    for state in (outside[0], outside[0].inner_state, inside[0]):
        np.testing.assert_array_equal(state.rounding_seed, numbers)
        assert state.rounding_seed.dtype == jnp.uint32
    _, after = jax.vmap(tx.update)(params, outside, params)
    chex.assert_trees_all_equal_structs(after, outside)
    np.testing.assert_array_equal(after[0].inner_state.rounding_seed, numbers)
    one = seed_rounding(tx.init(params[0]), 4)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(outside), strict=True):
        np.testing.assert_array_equal(x, y[0])
    # Residuals of 16 bits are exact: no random bits, no seed.
    tx = split_master_weights(optax.sgd(0.1), 16)
    state = tx.init(params)
    assert seed_rounding(state, 3).rounding_seed is None


def test_bad_members_are_named():
    tx = compress_state(optax.scale_by_rms(), nu=UE6M2)
    state = tx.init(jnp.ones(3))
    with pytest.raises(TypeError, match=r"integers, got 0\.5 of type float"):
        seed_rounding(state, 0.5)
    with pytest.raises(TypeError, match="got True of type bool"):
        seed_rounding(state, True)
    with pytest.raises(ValueError, match="from 0 to 2\\^32 - 1, got -1"):
        seed_rounding(state, -1)
    with pytest.raises(ValueError, match=r"rounding_step in the state, \(\), got .*4,"):
        seed_rounding(state, jnp.arange(4))
    with pytest.raises(ValueError, match="none in this EmptyState"):
        seed_rounding(optax.EmptyState(), 1)
