# SPDX-License-Identifier: Apache-2.0
"""What `compress_state` stores, for any transformation, and what it costs."""

import dataclasses
import functools
import pickle
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from optax_rms._compress_state import (
    CompressState,
    compress_state,
    count_extremes,
    decompress_state,
    recompress_state,
)
from optax_rms._minifloat import SE5M2, SE8M7, UE6M2, UE8M8, Minifloat, rounding_bits


def params():
    # Parameters may have the names of fields.
    return {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "mu": {"nu": jnp.ones(5)}}


def gradients(step):
    def leaf(p):
        random = np.random.default_rng((step, p.size))
        return jnp.asarray(random.normal(size=p.shape), jnp.float32)

    return jax.tree.map(leaf, params())


def labels(tree):
    return jax.tree.map(lambda p: "large" if jnp.size(p) > 5 else "small", tree)


# Transformations, formats for their fields, and how many elements then have codes.
CASES = {
    "rmsprop": (optax.rmsprop(0.1, momentum=0.9), {"nu": UE6M2, "trace": SE5M2}, 34),
    "centred": (optax.rmsprop(0.1, centered=True), {"nu": UE8M8, "mu": SE8M7}, 34),
    "adam": (optax.adam(0.1), {"nu": UE6M2, "mu": SE5M2}, 34),
    "adamw": (optax.adamw(0.1), {"nu": UE8M8}, 17),
    "adagrad": (optax.adagrad(0.1), {"sum_of_squares": UE6M2}, 17),
    "sgd": (optax.sgd(0.1, momentum=0.9), {"trace": SE8M7}, 17),
    "lion": (optax.lion(0.1), {"mu": SE5M2}, 17),
    "one field of two": (optax.adam(0.1), {"mu": SE5M2}, 17),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        {"nu": UE6M2},
        17,
    ),
    "partition": (
        optax.partition({"large": optax.adam(0.1), "small": optax.sgd(0.1)}, labels),
        {"nu": UE6M2},
        12,
    ),
    "masked": (
        optax.masked(optax.adam(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        {"nu": UE6M2},
        12,
    ),
    "MultiSteps": (
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        {"nu": UE6M2, "mu": SE5M2},
        34,
    ),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(0.1), 3), {"nu": UE6M2}, 17),
    "schedule_free": (
        optax.contrib.schedule_free(optax.rmsprop(0.1), 0.1),
        {"nu": UE6M2},
        17,
    ),
}
over_cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's bias correction fails under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def build(case):
    inner, formats, _ = CASES[case]
    return inner, _compressed(case), formats


@functools.cache
def _compressed(case):
    inner, formats, _ = CASES[case]
    return compress_state(inner, **formats)


@functools.cache
def compiled_step(tx):
    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    return jax.jit(step)


def train(tx, steps, first=0, p=None, state=None):
    """Take steps with fixed gradients; return parameters and state."""
    p = params() if p is None else p
    state = tx.init(p) if state is None else state
    for i in range(first, first + steps):
        p, state = compiled_step(tx)(p, state, gradients(i))
    return p, state


def signature(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(np.shape(x), x.dtype) for x in leaves]


def assert_same(a, b, rtol=0.0):
    """The same trees: integers equal, other numbers within ``rtol``."""
    assert signature(a) == signature(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        exact = jnp.issubdtype(x.dtype, jnp.integer)
        x, y = (np.asarray(v).astype(np.float64) for v in (x, y))
        np.testing.assert_allclose(x, y, rtol=0.0 if exact else rtol)


def fields_of(path, formats):
    names = [getattr(key, "name", None) for key in path]
    return [name for name in names if name in formats]


@over_cases
def test_codes_stand_in_for_the_arrays_of_the_fields_alone(case):
    inner, tx, formats = build(case)
    plain = inner.init(params())
    state = tx.init(params())
    _, after = jax.eval_shape(tx.update, gradients(0), state, params())
    assert signature(after) == signature(state)
    assert signature(decompress_state(state)) == signature(plain)
    codes = 0
    for (path, code), (plain_path, value) in zip(
        jax.tree_util.tree_leaves_with_path(state.inner_state),
        jax.tree_util.tree_leaves_with_path(plain),
        strict=True,
    ):
        assert path == plain_path
        assert code.shape == value.shape
        if code.dtype != value.dtype:
            (field,) = fields_of(path, formats)
            assert code.dtype == formats[field].dtype
            codes += code.size
    counts = count_extremes(state)
    assert counts.keys() == formats.keys()
    assert codes == sum(c.elements for c in counts.values()) == CASES[case][2]


@pytest.mark.parametrize("case", ["rmsprop", "adagrad", "partition", "MultiSteps"])
def test_an_update_is_decode_update_encode(case):
    inner, tx, formats = build(case)
    p, state = train(tx, 3)
    # Not compiled as a whole, which might round differently in the last place.
    updates, new_state = tx.update(gradients(3), state, p)
    values = decompress_state(state)
    expected_updates, expected = inner.update(gradients(3), values, p)
    assert_same(updates, expected_updates)
    assert state.rounding_step == 3
    assert new_state.rounding_step == 4
    for i, ((path, code), value) in enumerate(
        zip(
            jax.tree_util.tree_leaves_with_path(new_state.inner_state),
            jax.tree.leaves(expected),
            strict=True,
        )
    ):
        if code.dtype != value.dtype:
            (field,) = fields_of(path, formats)
            bits = rounding_bits(value.shape, step=4, leaf=i)
            value = formats[field].encode(value, bits)
        np.testing.assert_array_equal(code, value)


@pytest.mark.parametrize("case", ["rmsprop", "partition"])
def test_scan_vmap_and_donation_give_what_single_steps_give(case):
    _, tx, _ = build(case)
    expected = train(tx, 4)

    def body(carry, g):
        p, state = carry
        updates, state = tx.update(g, state, p)
        return (optax.apply_updates(p, updates), state), None

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *map(gradients, range(4)))
    scanned, _ = jax.lax.scan(body, (params(), tx.init(params())), stacked)
    assert_same(scanned, expected, rtol=1e-6)

    lanes = jax.tree.map(lambda p: jnp.stack([p, -p]), params())
    carry = (lanes, jax.vmap(tx.init)(lanes))
    step = jax.jit(jax.vmap(lambda c, g: body(c, g)[0]), donate_argnums=0)
    for i in range(4):
        old = carry
        carry = step(carry, jax.tree.map(lambda g: jnp.stack([g, -g]), gradients(i)))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert_same(jax.tree.map(lambda x: x[0], carry), expected, rtol=1e-6)


@over_cases
def test_tree_map_params_finds_the_codes(case):
    inner, tx, _ = build(case)

    def count(transformation, state):
        marked = optax.tree_map_params(
            transformation, lambda x: -1, state, transform_non_params=lambda x: 0
        )
        return sum(jax.tree.leaves(marked))

    assert count(tx, tx.init(params())) == count(inner, inner.init(params())) < 0


def save_with_pickle(state, path):
    path.write_bytes(pickle.dumps(state))
    return lambda like: pickle.loads(path.read_bytes())


def save_with_flax(state, path):
    path.write_bytes(flax.serialization.to_bytes(state))
    return lambda like: flax.serialization.from_bytes(like, path.read_bytes())


def save_with_orbax(state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)

    def restore(like):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, jax.eval_shape(lambda: like))

    return restore


over_checkpoints = pytest.mark.parametrize(
    "save", [save_with_pickle, save_with_flax, save_with_orbax]
)


@over_checkpoints
@pytest.mark.parametrize("case", ["rmsprop", "partition"])
def test_a_resumed_run_is_bit_exact(case, save, tmp_path):
    _, tx, _ = build(case)
    p, state = train(tx, 3)
    restored = save(state, tmp_path / "state")(tx.init(params()))
    assert_same(restored, state)
    assert_same(train(tx, 3, 3, p, restored), train(tx, 6))


@over_checkpoints
def test_a_checkpoint_of_another_window_is_an_error(save, tmp_path):
    _, state = train(compress_state(optax.scale_by_rms(), nu=UE6M2), 3)
    other = compress_state(optax.scale_by_rms(), nu=UE6M2.for_eps(1e-8))
    restore = save(state, tmp_path / "state")
    with pytest.raises(ValueError, match=r"UE6M2@-(46|27)"):
        # pickle restores what was saved, and leaves it to the update.
        other.update(gradients(0), restore(other.init(params())))


class Pair(NamedTuple):
    """Parameters in a class of their own, with the names of fields."""

    mu: Any
    nu: Any


def test_parameters_may_be_named_like_fields():
    p = {"layer": Pair(mu=jnp.ones(3), nu=jnp.ones((2, 2))), "mu": jnp.ones(4)}
    tx = compress_state(optax.adam(0.1), mu=SE8M7)
    state = tx.init(p)
    _, after = tx.update(p, state, p)
    for adam in (state.inner_state[0], after.inner_state[0]):
        assert {x.dtype for x in jax.tree.leaves(adam.mu)} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype(jnp.float32)}


class ScalesState(NamedTuple):
    scales: dict[str, jax.Array]
    nu: Any


def test_keys_of_dictionaries_in_a_state_are_no_fields():
    def init(params):
        return ScalesState({"nu": jnp.ones(3)}, jax.tree.map(jnp.zeros_like, params))

    inner = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
    state = compress_state(inner, nu=UE6M2).init(jnp.ones(2))
    assert state.inner_state.scales["nu"].dtype == jnp.float32
    assert state.inner_state.nu.dtype == jnp.uint8


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_what_the_transformation_leaves_alone_keeps_its_codes(where):
    formats = {"nu": UE6M2, "mu": SE5M2}
    if where == "inside":
        tx = compress_state(optax.adam(0.1), **formats)
        tx = optax.MultiSteps(tx, 3).gradient_transformation()
    else:
        tx = optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation()
        tx = compress_state(tx, **formats)
    p, state = train(tx, 3)

    def codes():
        (adam,) = (s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
        return adam.mu, adam.nu

    before = codes()
    for i in (3, 4):
        p, state = train(tx, 1, i, p, state)
        assert_same(codes(), before)
    p, state = train(tx, 1, 5, p, state)
    assert np.any(codes()[1]["w"] != before[1]["w"])


def test_a_skipped_step_keeps_the_codes():
    tx = optax.apply_if_finite(compress_state(optax.adam(0.1), nu=UE6M2), 5)
    p, state = train(tx, 2)
    nan = jax.tree.map(lambda g: g * jnp.nan, gradients(2))
    updates, skipped = tx.update(nan, state, p)
    assert_same(skipped.inner_state, state.inner_state)
    np.testing.assert_array_equal(updates["w"], 0)


def test_dtypes_are_those_of_the_inner_transformation():
    """Half precision is widened for ``inner`` and narrowed again; 64 bits stay."""

    def check(inner):
        def update(updates, state, params=None):
            for x in jax.tree.leaves((updates, state)):
                assert x.dtype in (jnp.float32, jnp.complex64, jnp.int32)
            return inner.update(updates, state, params)

        return optax.GradientTransformation(inner.init, update)

    p = {
        "half": jnp.ones(3, jnp.bfloat16),
        "single": jnp.ones((), jnp.float32),
        "complex": jnp.ones(2, jnp.complex64),
        "empty": jnp.ones((0, 2)),
        "none": None,
    }
    tx = compress_state(check(optax.adam(0.1)), nu=UE6M2)
    state = tx.init(p)
    for _ in range(2):
        updates, state = tx.update(p, state, p)
    assert signature(updates) == signature(p)
    assert signature(state) == signature(tx.init(p))
    adam = state.inner_state[0]
    assert jax.tree.map(lambda x: str(x.dtype), adam.mu) == jax.tree.map(
        lambda x: str(x.dtype), p
    )
    assert {key: str(x.dtype) for key, x in adam.nu.items() if x is not None} == {
        "half": "uint8",
        "single": "uint8",
        "complex": "complex64",
        "empty": "uint8",
    }
    with jax.enable_x64(True):
        p = {"double": jnp.ones(3, jnp.float64), "single": jnp.ones(3, jnp.float32)}
        state = tx.init(p)
        _, state = compress_state(optax.adam(0.1), nu=UE6M2).update(p, state, p)
        nu = state.inner_state[0].nu
        assert (nu["double"].dtype, nu["single"].dtype) == (jnp.float64, jnp.uint8)


def stream(kind, key, t, steps, scale):
    """One step's gradients, whose increments to a moving average come in four kinds."""
    if kind == "constant":
        return scale
    g = scale * jax.random.normal(jax.random.fold_in(key, t), scale.shape)
    if kind == "sparse":
        keep = (
            jax.random.uniform(jax.random.fold_in(key, t + 2**30), scale.shape) < 0.01
        )
        return jnp.where(keep, g, 0)
    if kind == "falling":
        return g * jnp.exp2(-10 * t.astype(jnp.float32) / steps)
    return g


def compressed_and_exact(kind, decay, formats, steps):
    """Moving averages after some steps, in each format and in float32, and scales^2."""
    exact = optax.scale_by_rms(decay)
    compressed = [compress_state(exact, nu=format) for format in formats]
    key = jax.random.key(0)
    scale = jnp.exp(2 * jax.random.normal(key, (2**14,))) * 1e-2
    fresh = optax.ScaleByRmsState(nu=scale**2)

    def body(states, t):
        g = stream(kind, key, t, steps, scale)
        return [
            tx.update(g, state)[1]
            for tx, state in zip([exact, *compressed], states, strict=True)
        ], None

    states = [recompress_state(tx.init(scale), fresh) for tx in compressed]
    (exact, *compressed), _ = jax.lax.scan(
        body, [fresh, *states], jnp.arange(steps, dtype=jnp.uint32)
    )
    values = [np.asarray(decompress_state(s).nu, np.float64) for s in compressed]
    return values, np.asarray(exact.nu, np.float64), np.asarray(scale, np.float64) ** 2


# Standard deviations of the logarithm of the root, measured with other random numbers
# and 2^17 elements, as they are written at `Minifloat`; without and with its decay.
NOISE = {
    ("gaussian", 0.9): (0.095, 0.079, 0.0014),
    ("gaussian", 0.99): (0.138, 0.138, 0.0042),
    ("gaussian", 0.999): (0.146, 0.150, 0.0130),
    ("constant", 0.999): (0.038, 0.150, 0.0013),
    ("sparse", 0.999): (0.179, 0.082, 0.0164),
    ("falling", 0.99): (0.44, 0.147, 0.014),
}


@pytest.mark.parametrize(("kind", "decay"), NOISE)
def test_moving_averages_have_no_bias_and_the_noise_of_the_format(kind, decay):
    formats = [UE6M2, dataclasses.replace(UE6M2, decay=decay), UE8M8]
    steps = {0.9: 100, 0.99: 600, 0.999: 3000}[decay]
    stored, exact, unit = compressed_and_exact(kind, decay, formats, steps)
    for format, values, noise in zip(formats, stored, NOISE[kind, decay], strict=True):
        bias = np.mean(values / unit) / np.mean(exact / unit) - 1
        error = np.std(values / unit) / np.mean(exact / unit) / np.sqrt(unit.size)
        assert 3 * error < 0.02, "too few elements to tell"
        assert abs(bias) < 0.02
        spread = np.std(0.5 * np.log(values / exact))
        assert spread < 1.15 * noise, format
