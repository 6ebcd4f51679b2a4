# SPDX-License-Identifier: Apache-2.0
"""What `compress_state` stores, for any transformation, and what it costs."""

import dataclasses
import functools
import pickle
import re
from typing import Any, ClassVar, NamedTuple

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers.on_request import first_by_default
from helpers.running import step
from helpers.trajectory import x64

from optax_rms import rmsprop, split_master_weights
from optax_rms.monitoring import count_extremes
from optax_rms.storage._compress_state import (
    compress_state,
    decompress_state,
    recompress_state,
)
from optax_rms.storage._formats import SE5M2, SE8M7, UE6M2, UE8M8, Minifloat
from optax_rms.storage._rounding import rounding_bits


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
    "centered": (optax.rmsprop(0.1, centered=True), {"nu": UE8M8, "mu": SE8M7}, 34),
    "own": (
        rmsprop(0.1, centered=True, momentum=0.9),
        {"variance": UE6M2, "mu": SE8M7, "trace": SE5M2},
        51,
    ),
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
    return jax.jit(functools.partial(step, tx))


def train(tx, steps, first=0, p=None, state=None):
    """Take steps with fixed gradients; return parameters and state."""
    p = params() if p is None else p
    state = tx.init(p) if state is None else state
    for i in range(first, first + steps):
        p, state = compiled_step(tx)(p, state, gradients(i))
    return p, state


assert_same_types = chex.assert_trees_all_equal_shapes_and_dtypes


def assert_same(actual, expected, rtol=0.0):
    """Equal up to ``rtol``, which leaves codes and counts no room to differ."""
    assert_same_types(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=0.0)


def fields_of(path, formats):
    names = [getattr(key, "name", None) for key in path]
    return [name for name in names if name in formats]


@over_cases
def test_codes_stand_in_for_the_arrays_of_the_fields_alone(case):
    inner, tx, formats = build(case)
    plain = inner.init(params())
    state = tx.init(params())
    _, after = jax.eval_shape(tx.update, gradients(0), state, params())
    assert_same_types(after, state)
    assert_same_types(decompress_state(state), plain)
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


@pytest.mark.parametrize(
    "case", first_by_default(["MultiSteps", "rmsprop", "adagrad", "partition"])
)
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


@pytest.mark.parametrize("case", first_by_default(["partition", "rmsprop"]))
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


def test_arrays_that_look_like_codes_are_none_in_parameters_named_like_fields():
    """A bfloat16 second moment at ``nu.mu`` has the dtype of SE8M7, and no codes."""
    p = {"layer": Pair(mu=jnp.ones(3, jnp.bfloat16), nu=jnp.ones(2, jnp.bfloat16))}
    inner = optax.adam(0.1)
    tx = compress_state(inner, mu=SE8M7)
    _, state = tx.update(p, tx.init(p), p)
    wide = decompress_state(state)[0]
    assert {x.dtype for x in jax.tree.leaves(wide.mu)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(wide.nu)} == {jnp.dtype(jnp.bfloat16)}
    assert count_extremes(state)["mu"].elements == 5
    # Rounded to the nearest as all of nu, and not at random: 1e-3 in bfloat16.
    for leaf in jax.tree.leaves(state.inner_state[0].nu):
        np.testing.assert_array_equal(leaf, jnp.full_like(leaf, 1e-3))


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
    assert_same_types(updates, p)
    assert_same_types(state, tx.init(p))
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
    with x64():
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


def moving_averages(kind, decay, formats, steps, size):
    """Moving averages after some steps, in each format and in float32, and scales^2."""
    exact = optax.scale_by_rms(decay)
    compressed = [compress_state(exact, nu=format) for format in formats]
    key = jax.random.key(0)
    scale = jnp.exp(jax.random.normal(key, (size,)))
    fresh = optax.ScaleByRmsState(scale**2 * (0.01 if kind == "sparse" else 1))

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


# Standard deviations of the logarithm of the root: for UE6M2, for UE6M2 with the decay,
# and for UE8M8. Those that stand at `Minifloat` are of other random numbers.
NOISE = {
    ("gaussian", 0.9): (0.095, 0.079, 0.0014),
    ("gaussian", 0.99): (0.138, 0.138, 0.0042),
    ("gaussian", 0.999): (0.146, 0.150, 0.0130),
    ("constant", 0.999): (0.038, 0.150, 0.0006),
    ("sparse", 0.999): (0.179, 0.082, 0.0164),
    ("falling", 0.99): (0.44, 0.147, 0.014),
}


@pytest.mark.parametrize(("kind", "decay"), first_by_default(NOISE, 2))
def test_moving_averages_have_no_bias_and_the_noise_of_the_format(kind, decay):
    formats = [UE6M2, dataclasses.replace(UE6M2, decay=decay), UE8M8]
    # Time enough to forget the initial values, and to fall by 2^-20.
    steps = {0.9: 100, 0.99: 600, 0.999: 3000}[decay] * (2 if kind == "falling" else 1)
    # Values that fall far spread far.
    size = 2**16 if kind == "falling" else 2**14
    stored, exact, unit = moving_averages(kind, decay, formats, steps, size)
    for format, values, noise in zip(formats, stored, NOISE[kind, decay], strict=True):
        bias = np.mean(values / unit) / np.mean(exact / unit) - 1
        error = np.std(values / unit) / np.mean(exact / unit) / np.sqrt(unit.size)
        assert 3 * error < 0.02, "too few elements to tell"
        assert abs(bias) < 0.02, format
        spread = np.std(0.5 * np.log(values / exact))
        assert abs(spread / noise - 1) < 0.1, format


def test_rounding_to_nearest_would_not_do():
    """The same measurement finds the bias of a moving average that cannot move."""
    nearest = [_NearestFormat(**dataclasses.asdict(UE6M2))]
    (values,), exact, unit = moving_averages("falling", 0.99, nearest, 600, 2**12)
    assert abs(np.mean(values / unit) / np.mean(exact / unit) - 1) > 1


class _NearestFormat(Minifloat):
    def encode(self, x, bits, step=0):
        return super().encode(x, jnp.uint32(2**31), step)


def mean_loss(tx, scale):
    """The mean loss of a small network on the way to a solution, and its last state."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (128, 8))
    hidden = jnp.tanh(x @ jax.random.normal(keys[1], (8, 8)))
    y = hidden @ jax.random.normal(keys[2], (8,))
    p = {
        "w": 0.3 * jax.random.normal(keys[3], (8, 16)),
        "v": 0.3 * jax.random.normal(keys[4], (16,)),
    }

    def loss(p):
        return scale * jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2)

    def body(carry, _):
        p, state = carry
        value, g = jax.value_and_grad(loss)(p)
        updates, state = tx.update(g, state, p)
        return (optax.apply_updates(p, updates), state), value / scale

    (_, state), losses = jax.lax.scan(body, (p, tx.init(p)), None, length=200)
    return losses.mean(), state


@pytest.mark.slow
def test_every_loss_scale_trains_alike_in_a_window_from_eps():
    scales = 2.0 ** jnp.arange(-16.0, 17.0, 8.0)
    inner = optax.rmsprop(3e-3, decay=0.9, eps=1e-8)
    exact, _ = jax.vmap(lambda scale: mean_loss(inner, scale))(scales)

    def differences(format):
        tx = compress_state(inner, nu=format)
        loss, state = jax.vmap(lambda scale: mean_loss(tx, scale))(scales)
        counts = jax.vmap(lambda state: count_extremes(state)["nu"].saturated)(state)
        return np.abs(loss / exact - 1), counts

    # The steps are 1 % longer, by which the loss gets down a little earlier.
    close, saturated = differences(UE6M2.for_eps(1e-8))
    np.testing.assert_array_less(close, 0.02)
    np.testing.assert_array_equal(saturated, 0)
    # A window for eps outside of the root begins, and ends, too low.
    far, saturated = differences(UE6M2.for_eps(1e-8, eps_in_sqrt=False))
    assert far[-1] > 0.2
    assert saturated[-1] > 0
    # Two bytes need no window.
    close, saturated = differences(UE8M8)
    np.testing.assert_array_less(close, 0.002)
    np.testing.assert_array_equal(saturated, 0)


def test_codes_are_the_same_under_any_sharding_and_need_no_collective():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    specs = {"w": ("x", "y"), "v": (None, "y"), "b": ("x",), "s": ()}
    shardings = {
        name: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        for name, spec in specs.items()
    }
    random = np.random.default_rng(0)
    shapes = {"w": (8, 6), "v": (3, 4), "b": (20,), "s": ()}
    p = {k: jnp.asarray(random.normal(size=s), jnp.float32) for k, s in shapes.items()}
    tx = compress_state(optax.rmsprop(0.1, momentum=0.9), nu=UE6M2, trace=SE5M2)

    def step(p, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, p), state, p)
        return optax.apply_updates(p, updates), state

    sharded = jax.device_put(p, shardings)
    state = tx.init(sharded)
    compiled = jax.jit(step).lower(sharded, state).compile()
    text = compiled.as_text()
    for collective in ("all-", "collective", "reduce-scatter"):
        assert f" {collective}" not in text
    expected = p, tx.init(p)
    for _ in range(3):
        sharded, state = compiled(sharded, state)
        expected = jax.jit(step)(*expected)
    for name, sharding in shardings.items():
        for codes in (state.inner_state[0].nu, state.inner_state[2].trace):
            assert codes[name].sharding.is_equivalent_to(sharding, codes[name].ndim)
    assert_same((sharded, state), expected, rtol=1e-6)


def compiled_step_of(tx, shape):
    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, p)

    compiled = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
    return compiled.lower(p, state, p).compile()


@pytest.mark.parametrize(
    ("inner", "formats"),
    [
        (optax.rmsprop(0.1), {"nu": UE6M2}),
        (rmsprop(0.1), {"nu": UE6M2}),
        (rmsprop(0.1), {"nu": dataclasses.replace(UE6M2, decay=0.9)}),
        (optax.adam(0.1), {"nu": UE6M2, "mu": SE5M2}),
        (optax.adagrad(0.1), {"sum_of_squares": UE6M2}),
        (optax.lion(0.1), {"mu": SE5M2}),
    ],
)
def test_a_compiled_step_moves_a_quarter_less_memory(inner, formats):
    shape = (512, 512)
    exact = compiled_step_of(inner, shape)
    step = compiled_step_of(compress_state(inner, **formats), shape)
    # 100 bytes are for scalars. Of 28 bytes per element for RMSProp, 21 are left.
    moved, exact_moved = (c.cost_analysis()["bytes accessed"] for c in (step, exact))
    assert moved <= 0.75 * exact_moved + 100
    # The copies of the codes that XLA makes on the CPU, but nothing in float32.
    codes = len(formats) * 512 * 512
    assert step.memory_analysis().temp_size_in_bytes <= codes + 4096


@pytest.mark.parametrize(
    ("inner", "formats", "expected"),
    [
        (optax.rmsprop(0.1), {"nu": UE6M2}, 1),
        (optax.rmsprop(0.1), {"nu": UE8M8}, 2),
        (optax.rmsprop(0.1, momentum=0.9), {"nu": UE6M2, "trace": SE5M2}, 2),
        (optax.adam(0.1), {"nu": UE6M2, "mu": SE8M7}, 3),
        (optax.sgd(0.1, momentum=0.9), {"trace": SE5M2}, 1),
    ],
)
def test_bytes_per_parameter(inner, formats, expected):
    tx = compress_state(inner, **formats)
    state = tx.init({"w": jnp.zeros((100, 100)), "b": jnp.zeros(10_000)})
    measured = sum(x.nbytes for x in jax.tree.leaves(state)) / 20_000
    # The rounding step, the fingerprint and Adam's count are 4 bytes each.
    assert expected < measured <= expected + 12 / 20_000


class _CountingFormat(Minifloat):
    traces: ClassVar[list[tuple[int, ...]]] = []

    def encode(self, x, bits, step=0):
        self.traces.append(x.shape)
        return super().encode(x, bits, step)


def test_leaves_of_one_shape_are_traced_once():
    tx = compress_state(
        optax.scale_by_rms(), nu=_CountingFormat(**dataclasses.asdict(UE6M2))
    )
    p = [jnp.ones(7)] * 50 + [jnp.ones((2, 3))] * 50
    jax.jit(tx.update).lower(p, tx.init(p))
    assert sorted(_CountingFormat.traces) == [(2, 3), (7,)]


def test_extremes_are_counted_over_all_arrays_of_a_field():
    tx = optax.chain(compress_state(optax.adam(0.1), nu=UE6M2, mu=SE5M2))
    p = {"a": jnp.array([1e9, 0.0, 1.0]), "b": jnp.array([[-1e9, 1e-3]])}
    _, state = tx.update(p, tx.init(p))
    counts = jax.jit(count_extremes)(state)
    assert counts["nu"] == (5, 2, 1)
    assert counts["mu"] == (5, 2, 1)
    # Lowered levels are no further from the end.
    sinking = dataclasses.replace(UE6M2, decay=0.9)
    tx = compress_state(optax.scale_by_rms(), nu=sinking)
    state = tx.init(p)
    for _ in range(3):
        _, state = tx.update(p, state)
    assert count_extremes(state)["nu"] == (5, 2, 1)


def test_a_run_can_begin_and_end_without_compression():
    inner, tx, _ = build("rmsprop")
    p, state = train(inner, 3)
    compressed = recompress_state(tx.init(p), state)
    assert_same_types(compressed, tx.init(p))
    view = decompress_state(compressed)
    for field, format in [("nu", UE6M2), ("trace", SE5M2)]:
        for x, y in zip(
            jax.tree.leaves([getattr(s, field, None) for s in view]),
            jax.tree.leaves([getattr(s, field, None) for s in state]),
            strict=True,
        ):
            assert np.all(
                np.abs(x - y) <= 0.25 * np.abs(y) + 2.0**format.lowest_exponent
            )
            assert np.any(x != y)
    # What has been rounded once stays, and the run goes on from it.
    assert_same(recompress_state(compressed, view), compressed)
    assert_same_types(train(inner, 1, 3, p, view)[1], state)


def test_groups_of_parameters_may_have_formats_of_their_own():
    """The outer formats are for what has not been compressed inside."""
    adam = optax.adam(0.1)
    large = compress_state(adam, nu=UE6M2, mu=SE5M2)
    tx = compress_state(
        optax.partition({"large": large, "small": adam}, labels), nu=UE8M8
    )
    plain = optax.partition({"large": adam, "small": adam}, labels)
    state = tx.init(params())
    assert_same_types(decompress_state(state), plain.init(params()))
    p, state = train(optax.chain(tx), 2)
    assert_same_types(decompress_state(state)[0], plain.init(p))
    assert_same(recompress_state(state, decompress_state(state)), state)
    elements = {k: c.elements for k, c in count_extremes(state).items()}
    assert elements == {"nu": 12 + 5, "mu": 12}
    dtypes = [str(x.dtype) for x in jax.tree.leaves(state)]
    assert [dtypes.count(f"uint{bits}") for bits in (8, 16)] == [2, 1]


def test_rounding_steps_wrap_instead_of_standing_still():
    _, tx, _ = build("adagrad")
    state = tx.init(params())._replace(rounding_step=jnp.uint32(2**32 - 1))
    _, state = tx.update(gradients(0), state)
    assert state.rounding_step == 0


def test_derivatives_go_through_the_update_and_end_at_the_codes():
    inner, tx, _ = build("adagrad")
    p, state = train(tx, 2)

    def length(transformation, state):
        def of(g):
            updates, _ = transformation.update(g, state, p)
            return optax.tree.norm(updates)

        return jax.grad(of)(gradients(2))

    assert_same(length(tx, state), length(inner, decompress_state(state)), rtol=1e-5)


def message_of(error, function, *args, **kwargs):
    with pytest.raises(error) as info:
        function(*args, **kwargs)
    return str(info.value)


def test_fields_that_do_not_exist_are_errors_that_name_those_that_do():
    tx = compress_state(optax.adam(0.1), nu=UE6M2, vu=UE6M2, momentum=SE5M2)
    message = message_of(ValueError, tx.init, params())
    assert "vu, momentum" in message
    assert "count (int32); mu (float32); nu (float32)" in message
    message = message_of(
        ValueError, compress_state(optax.adam(0.1), count=UE6M2).init, params()
    )
    assert "nothing to compress in count" in message
    message = message_of(
        ValueError,
        compress_state(optax.adam(0.1), mu=SE5M2).init,
        jnp.ones(3, jnp.complex64),
    )
    assert "nothing to compress in mu" in message
    assert "mu (complex64)" in message
    message = message_of(
        ValueError, compress_state(optax.sgd(0.1), trace=SE5M2).init, params()
    )
    assert "The fields of the state are none" in message


def test_formats_are_checked():
    assert "at least one field" in message_of(ValueError, compress_state, optax.sgd(1))
    message = message_of(
        TypeError, compress_state, optax.adam(1), mu=jnp.bfloat16, nu="UE6M2"
    )
    assert "mu=<class" in message
    assert "nu='UE6M2'" in message
    for field in ("mu", "trace"):
        fields = {field: UE6M2}
        message = message_of(ValueError, compress_state, optax.sgd(1), **fields)
        assert f"format of {field} must be signed" in message


def test_other_states_are_errors():
    inner, tx, _ = build("rmsprop")
    plain, state = inner.init(params()), tx.init(params())
    message = message_of(TypeError, tx.update, gradients(0), plain)
    assert "got tuple" in message
    other = compress_state(inner, nu=UE6M2)
    message = message_of(ValueError, other.update, gradients(0), state)
    assert "'trace=SE5M2@-28'" in message
    for function in (decompress_state, count_extremes):
        assert "none in this tuple" in message_of(ValueError, function, plain)
    message = message_of(ValueError, recompress_state, plain, plain)
    assert "none in this tuple" in message


def test_values_of_another_shape_are_errors_that_name_the_leaf():
    inner, tx, _ = build("rmsprop")
    state = tx.init(params())
    p = params() | {"w": jnp.zeros((2, 3))}
    message = message_of(ValueError, recompress_state, state, inner.init(p))
    assert "[0].nu['w'] has shape (2, 3), not (4, 3)" in message
    assert "[2].trace['w'] has shape (2, 3), not (4, 3)" in message
    other = optax.adam(0.1).init(params())
    message = message_of(ValueError, recompress_state, state, other)
    assert "ScaleByAdamState" in message
    assert "ScaleByRmsState" in message


@pytest.mark.parametrize("split", [False, True])
def test_leaves_of_one_shape_share_their_loops(split):
    """XLA for a CPU then compiles each loop once."""

    def loops(count):
        tx = compress_state(rmsprop(0.1), nu=UE6M2)
        tx = split_master_weights(tx) if split else tx
        params = count * [jnp.ones(100, jnp.bfloat16 if split else jnp.float32)]
        program = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
        names = r"metadata={[^}]*}|(?<=[a-z])\.\d+|(?<=param_)[\d.]+"
        text = re.sub(names, "", program.as_text())
        return {c for c in text.split("\n\n") if c.startswith("%fused_computation")}

    assert len(loops(3)) == len(loops(2)) > 0
