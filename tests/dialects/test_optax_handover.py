# SPDX-License-Identifier: Apache-2.0
"""`dialects.optax`: states of Optax taken over and handed back.

That the updates are those of Optax is tested in test_rmsprop.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import reference, trajectory
from helpers.comparison import assert_same_bits
from helpers.on_request import first_by_default
from helpers.running import at, run
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import optax_rms
from optax_rms.dialects import optax as dialect

BOUND = 2e-5
DECAY = 0.9


@pytest.fixture(autouse=True)
def _optax_needs_promotion():
    """The bias correction of Optax mixes an integer count with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def evolved(tx, gradients, steps=3):
    """The state after some steps on the first gradients."""
    return run(tx, at(gradients, slice(steps))).last[1]


def random_gradients(seed=0, steps=4, dtype=np.float32):
    rng = np.random.default_rng(seed)
    tree = {"w": rng.normal(size=(steps, 2, 3)), "b": 5 + rng.normal(size=(steps, 3))}
    return jax.tree.map(lambda g: jnp.asarray(g, dtype), tree)


def test_the_optimizer_is_our_own():
    assert dialect.rmsprop is optax_rms.rmsprop


@pytest.mark.parametrize("momentum", first_by_default([0.9, None]))
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_a_run_handed_over_and_back(centered, bias_correction, momentum):
    gradients = jnp.asarray(trajectory.alternating_stream(75, eps=1e-4))
    rates = optax.exponential_decay(0.1, 20, 0.5)
    arguments = {
        "decay": DECAY,
        "eps": 1e-4,
        "centered": centered,
        "bias_correction": bias_correction,
        "momentum": momentum,
        "nesterov": momentum is not None,
    }
    theirs = optax.rmsprop(rates, **arguments)
    ours = optax_rms.rmsprop(rates, **arguments)
    first = run(theirs, gradients[:25], how="jit")
    state = dialect.import_state(first.last[1], DECAY)
    second = run(ours, gradients[25:50], state=state, how="jit")
    state = dialect.export_state(second.last[1], DECAY)
    third = run(theirs, gradients[50:], state=state, how="jit")
    updates = np.concatenate([first.updates, second.updates, third.updates])
    mixed = np.cumsum(updates, axis=0, dtype=np.float64)
    expected = run(theirs, gradients, how="jit").path
    assert reference.relative_error(mixed, expected) <= BOUND


def optax_state(seed, decay, steps, bias_correction, dtype):
    """A centered state that ``optax.rmsprop`` could have after some steps."""
    rng = np.random.default_rng(seed)
    mu, nu = np.zeros(50, dtype), np.zeros(50, dtype)
    for _ in range(steps):
        g = rng.normal(size=50) + rng.normal(scale=100, size=50)
        if dtype == np.complex64:
            g = g + 1j * rng.normal(size=50)
        mu = (decay * mu + (1 - decay) * g).astype(dtype)
        nu = (decay * nu + (1 - decay) * np.abs(g) ** 2).astype(dtype)
    if not bias_correction:
        return optax.ScaleByRStdDevState(mu=mu, nu=nu)
    return WithCount(count=np.int32(steps), mu=mu, nu=nu)


WithCount = type(optax.scale_by_stddev(bias_correction=True).init(()))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    decay=st.floats(0.0, 0.9999),
    steps=st.integers(0, 5),
    bias_correction=st.booleans(),
    dtype=st.sampled_from([np.float32, np.complex64]),
)
def test_a_round_trip_changes_no_bit(seed, decay, steps, bias_correction, dtype):
    state = optax_state(seed, decay, steps, bias_correction, dtype)
    imported = dialect.import_state(state, decay)
    exported = dialect.export_state(imported, decay)
    assert_same_bits(dialect.import_state(exported, decay), imported)
    for x, y in zip(*map(jax.tree.leaves, (exported, state)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_values_of_converted_fields():
    state = optax.ScaleByRStdDevState(mu=jnp.array(3.0), nu=jnp.array(25.0))
    imported = dialect.import_state(state)
    assert imported == optax_rms.ScaleByStddevState(None, 3.0, 16.0)
    state = WithCount(count=jnp.array(1), mu=jnp.array(1.5), nu=jnp.array(12.5))
    imported = dialect.import_state(state, decay=0.5)
    assert imported == optax_rms.ScaleByStddevState(1, 3.0, 8.0)


def test_a_variance_lost_to_rounding_is_zero():
    state = optax.ScaleByRStdDevState(mu=jnp.array(3.0), nu=jnp.array(8.999999))
    assert dialect.import_state(state).variance == 0.0


@pytest.mark.parametrize("bias_correction", [False, True])
def test_not_centered_nothing_changes(bias_correction):
    tx = optax.rmsprop(0.1, momentum=0.9, bias_correction=bias_correction)
    state = evolved(tx, random_gradients())
    assert_same_bits(dialect.import_state(state), state)
    assert_same_bits(dialect.export_state(state), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip(1.0), tx, optax.trace(0.9)),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
    ],
)
def test_inside_of_other_states(wrap):
    gradients = random_gradients()
    ours = wrap(optax_rms.rmsprop(0.1, centered=True))
    theirs = evolved(wrap(optax.rmsprop(0.1, centered=True)), gradients, steps=1)
    state = dialect.import_state(theirs)
    expected = ours.init(jax.tree.map(lambda g: g[0], gradients))
    chex.assert_trees_all_equal_structs(state, expected)
    assert_same_bits(dialect.export_state(state), theirs)


def test_half_precision_becomes_float32():
    gradients = random_gradients(dtype=jnp.bfloat16)
    state = evolved(optax.rmsprop(0.1, centered=True), gradients)
    imported = dialect.import_state(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(imported)} == {jnp.dtype("float32")}


def test_sharding_stays():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    state = optax.rmsprop(0.1, centered=True).init(params)
    for leaf in jax.tree.leaves(dialect.import_state(state)):
        assert leaf.sharding == sharding


@pytest.mark.parametrize("convert", [dialect.import_state, dialect.export_state])
@pytest.mark.parametrize("centered", [False, True])
def test_unplaced_states_stay_unplaced(convert, centered):
    """A state from unplaced parameters goes along with gradients on any devices."""
    make = optax.rmsprop if convert is dialect.import_state else optax_rms.rmsprop
    converted = convert(make(0.1, centered=centered).init(jnp.arange(16.0)))
    assert not any(leaf.committed for leaf in jax.tree.leaves(converted))


def centered_state(**changes):
    state = optax.ScaleByRStdDevState(
        mu={"w": jnp.ones((2, 3)), "b": jnp.ones(3)},
        nu={"w": jnp.full((2, 3), 4.0), "b": jnp.full(3, 4.0)},
    )
    return (state._replace(**changes), optax.EmptyState(), optax.EmptyState())


def with_count(count):
    state = WithCount(count=count, mu=jnp.ones(3), nu=jnp.full(3, 4.0))
    return (state, optax.EmptyState(), optax.EmptyState())


def mean_square(nu):
    return (optax.ScaleByRmsState(nu=nu), optax.EmptyState(), optax.EmptyState())


@pytest.mark.parametrize(
    ("dtype", "tiny"),
    [(jnp.float32, 1e-20), (jnp.float16, 1e-4), (jnp.bfloat16, 1e-20)],
)
def test_squares_that_underflow_are_no_damage(dtype, tiny):
    gradients = jnp.array([1.0, tiny, 0.0], dtype)
    theirs = optax.rmsprop(0.1, centered=True)
    state = theirs.init(gradients)
    for _ in range(3):
        _, state = theirs.update(gradients, state)
    assert state[0].nu[1] == 0 < state[0].mu[1]
    assert dialect.import_state(state)[0].variance[1] == 0


W, B = jnp.full((2, 3), 4.0), jnp.full(3, 4.0)
DAMAGE = {
    "adam": (optax.adam(0.1).init(jnp.ones(3)), {}, "no state of RMSProp"),
    "nothing": (None, {}, "no state of RMSProp"),
    "only parameters": ({"w": W}, {}, "no state of RMSProp"),
    "imported already": (
        optax_rms.rmsprop(0.1, centered=True).init(W),
        {},
        "0 is ScaleByStddevState already",
    ),
    "NaN": (mean_square({"w": W * jnp.nan}), {}, "0.nu.w must be finite"),
    "infinite": (
        centered_state(nu={"w": W, "b": B * jnp.inf}),
        {},
        "0.nu.b must be fin",
    ),
    "negative": (mean_square({"w": -W}), {}, "0.nu.w must not be negative"),
    "negative, centered": (centered_state(nu={"w": -W, "b": B}), {}, "0.nu.w must not"),
    "integers": (mean_square({"w": W.astype(int)}), {}, "0.nu.w must be floating"),
    "no arrays": (mean_square({"w": "lost"}), {}, "0.nu.w must be an array"),
    "no mean": (centered_state(mu=None), {}, "needs mu and nu of one shape"),
    "a mean missing": (centered_state(mu={"b": B / 4}), {}, "0 needs mu and nu of one"),
    "a mean too many": (
        centered_state(mu={"w": W / 4, "b": B / 4, "c": B}),
        {},
        "0 needs mu and nu of one shape.*0.mu.c",
    ),
    "renamed": (centered_state(mu={"w": W / 4, "c": B}), {}, "0.mu.c"),
    "swapped shapes": (
        centered_state(mu={"w": B / 4, "b": W / 4}),
        {},
        r"0.mu.w': \(3,\), '0.nu.w': \(2, 3\)",
    ),
    "swapped fields": (
        centered_state(mu={"w": W, "b": B}, nu={"w": W / 4, "b": B / 4}),
        {},
        "0.mu.w is more than the root of 0.nu.w",
    ),
    "no decay": (with_count(jnp.array(3)), {}, "pass the decay"),
    "NaN decay": (with_count(jnp.array(3)), {"decay": np.nan}, "decay must be"),
    "decay of 1": (with_count(jnp.array(3)), {"decay": 1.0}, "decay must be"),
    "negative steps": (with_count(jnp.array(-3)), {"decay": 0.9}, "0.count must be"),
    "half a step": (
        with_count(jnp.array(2.5)),
        {"decay": 0.9},
        "0.count must be a whole",
    ),
    "counts per parameter": (
        with_count(jnp.arange(3)),
        {"decay": 0.9},
        "0.count must be a number",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_states_are_reported(kind):
    state, arguments, message = DAMAGE[kind]
    with pytest.raises(ValueError, match=message):
        dialect.import_state(state, **arguments)


def test_damage_is_reported_all_at_once():
    state = centered_state(nu={"w": -W, "b": B * jnp.nan})
    with pytest.raises(ValueError, match="cannot be imported") as raised:
        dialect.import_state(state)
    assert "0.nu.w must not be negative" in str(raised.value)
    assert "0.nu.b must be finite" in str(raised.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (centered_state(), "0 is ScaleByRStdDevState already"),
        (optax.adam(0.1).init(W), "no state of RMSProp"),
        (optax_rms.scale_by_rms(centered=True, bias_correction=True).init(W), "decay"),
    ],
)
def test_export_refuses(state, message):
    with pytest.raises(ValueError, match=message):
        dialect.export_state(state)
