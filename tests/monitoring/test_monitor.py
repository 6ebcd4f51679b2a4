# SPDX-License-Identifier: Apache-2.0
"""The wrapper: the updates of what it wraps, the report of that step, and its cost."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import characters, digits
from flax import nnx
from flax.training.train_state import TrainState
from helpers.comparison import assert_same_bits
from helpers.on_request import first_by_default
from helpers.running import at, step
from helpers.training import GRADIENTS as STACKED_GRADIENTS
from helpers.training import PARAMS, STEPS, assert_close

import optax_rms
from benchmarks.compiled import bytes_in_memory, instructions, launches, moved_bytes
from optax_rms import monitor, read_report, step_report

OPTIONS = {"eps": 1e-4, "decay": 0.8}
GRADIENTS = [at(STACKED_GRADIENTS, t) for t in range(STEPS)]
RMS = functools.partial(optax_rms.rmsprop, 0.1, 0.8, 1e-4)


def compressed():
    return optax_rms.compress_state(RMS(), nu=optax_rms.UE6M2)


INNERS = {
    "rmsprop": RMS,
    "momentum": functools.partial(RMS, momentum=0.9),
    "centered": functools.partial(RMS, centered=True),
    "compressed": compressed,
    "adam": functools.partial(optax.adam, 0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), RMS()),
}


def loop(tx, params=PARAMS, gradients=GRADIENTS, state=None, *, jit=False):
    """Parameters and state after every step, as they are and where they are."""
    advance = functools.partial(step, tx)
    advance = jax.jit(advance) if jit else advance
    state = tx.init(params) if state is None else state
    history = []
    for g in gradients:
        params, state = advance(params, state, g)
        history.append((params, state))
    return history


@pytest.fixture(autouse=True)
def standard_promotion():
    # Of Optax, Adam's bias correction does not bear strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", first_by_default(INNERS, 3))
def test_updates_and_inner_state_are_those_of_inner_bit_for_bit(name):
    """Where nothing is fused; compiled, they are equal but for rounding."""
    inner = INNERS[name]()
    plain = loop(inner)
    monitored = loop(monitor(inner, **OPTIONS))
    for (params, state), (expected, inner_state) in zip(monitored, plain, strict=True):
        assert_same_bits(params, expected)
        assert_same_bits(state.inner_state, inner_state)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "name", first_by_default([name for name in INNERS if name != "compressed"])
)
def test_compiled_updates_are_those_of_inner(name, every):
    inner = INNERS[name]()
    plain = loop(inner, jit=True)
    monitored = loop(monitor(inner, every, **OPTIONS), jit=True)
    for (params, state), expected in zip(monitored, plain, strict=True):
        assert_close((params, state.inner_state), expected)


def test_gradients_keep_every_bit():
    odd = jnp.asarray([0x7F800001, 0x80000000, 1, 0x7F800000], jnp.uint32)
    gradients = jax.lax.bitcast_convert_type(odd, jnp.float32)
    tx = monitor(optax.identity())
    update = jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])
    bits = jax.lax.bitcast_convert_type(update(gradients), jnp.uint32)
    assert bits.tolist() == odd.tolist()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_report_is_that_of_the_last_step_that_was_due(every):
    inner, tx = RMS(), monitor(RMS(), every, **OPTIONS)
    expected = None
    params = PARAMS
    before = PARAMS, inner.init(PARAMS)
    for t, (_, state) in enumerate(loop(tx, jit=True)):
        params, inner_state = before
        updates, inner_state = inner.update(GRADIENTS[t], inner_state, params)
        if t % every == 0:
            expected = step_report(
                GRADIENTS[t], updates, params, inner_state, **OPTIONS
            )
        before = optax.apply_updates(params, updates), inner_state
        actual = read_report(state)
        for name in ("ruled_by_eps", "at_cap", "lost_to_rounding", "live"):
            assert_same_bits(getattr(actual, name), getattr(expected, name))
        for name in ("gradient_rms", "update_rms", "parameter_rms", "second_moment"):
            # Fused otherwise, an update or a mean square rounds once more or less.
            np.testing.assert_allclose(
                getattr(actual, name), getattr(expected, name), rtol=4 * 2.0**-24
            )
        np.testing.assert_allclose(actual.rates, expected.rates, rtol=1 / 8)
    assert int(state.num_steps) == len(GRADIENTS)


def test_structure_is_fixed_by_init_and_scan_takes_it():
    tx = monitor(RMS(), 2, **OPTIONS)
    state = tx.init(PARAMS)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    for _, after in loop(tx, jit=True):
        assert types == jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), after)

    def body(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    stream = jax.tree.map(lambda *xs: jnp.stack(xs), *GRADIENTS)
    (_, state), _ = jax.jit(functools.partial(jax.lax.scan, body))(
        (PARAMS, state), stream
    )
    # Of the third of four steps.
    rms = float(np.sqrt(np.mean(np.square(GRADIENTS[2]["bias"], dtype=np.float64))))
    assert read_report(state).leaves["bias"].gradient_rms == pytest.approx(rms)


LINEN_INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)


def test_train_state():
    tx = optax.chain(optax.clip(1.0), monitor(RMS(), **OPTIONS))
    params = {"w": jnp.ones((3, 2))}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads={"w": jnp.full((3, 2), 9.0)})
    figures = read_report(state.opt_state).leaves["w"]
    # Behind the clipping.
    assert figures.gradient_rms == 1
    assert figures.at_cap == 1


def test_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, monitor(RMS(), 2, **OPTIONS), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradient = nnx.grad(lambda m: jnp.sum(m(LINEN_INPUTS) ** 2))(model)
        optimizer.update(model, gradient)
        return gradient

    first, _ = step(model, optimizer), step(model, optimizer)
    report = read_report(optimizer.opt_state)
    kernel = np.asarray(jax.tree.leaves(first)[1], np.float64)
    assert kernel.shape == (3, 2)
    (name,) = [name for name in report.leaves if "kernel" in name]
    figures = report.leaves[name]
    rms = np.sqrt(np.mean(kernel**2))
    assert figures.gradient_rms == pytest.approx(rms, rel=1e-6)
    assert figures.at_cap == 1
    assert report.whole.elements == 8
    assert name in report.table()


def test_equinox():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    tx = monitor(RMS(), **OPTIONS)
    params = eqx.filter(model, eqx.is_inexact_array)
    state = tx.init(params)

    @eqx.filter_jit
    def step(model, state):
        gradient = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(m)(LINEN_INPUTS) ** 2))(
            model
        )
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(gradient, state, params)
        return eqx.apply_updates(model, updates), state

    model, state = step(model, state)
    assert "layers.0.weight" in read_report(state).leaves
    assert read_report(state).whole.elements == 26


def test_gradient_of_none_is_reported_as_zero():
    tx = monitor(optax.sgd(0.1))
    params = {"w": jnp.ones(3), "frozen": jnp.ones(2)}
    state = tx.init(params)
    gradients = {"w": jnp.ones(3), "frozen": None}
    updates, after = tx.update(gradients, state, params)
    assert updates["frozen"] is None
    assert jax.tree.structure(after) == jax.tree.structure(state)
    leaves = read_report(after).leaves
    assert leaves["frozen"].zero_gradients == 1
    assert leaves["w"].zero_gradients == 0


def test_extra_arguments_reach_inner():
    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, *, scale: (
            jax.tree.map(lambda g: scale * g, updates),
            state,
        ),
    )
    tx = monitor(inner, every=2)
    update = jax.jit(lambda g, scale: tx.update(g, tx.init(g), g, scale=scale))
    updates, state = update(jnp.ones(3), 5.0)
    assert updates.tolist() == [5, 5, 5]
    assert read_report(state).whole.update_rms == 5


def test_abstract_parameters():
    abstract = jax.eval_shape(lambda: PARAMS)
    state = jax.eval_shape(monitor(RMS()).init, abstract)
    assert state.report.gradient_rms.shape == (2,)


def test_sharded_state_and_report():
    """Moments lie where the parameters do, the report everywhere, with equal counts."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    copied = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = monitor(RMS(), 2, **OPTIONS)
    params = jax.device_put(PARAMS, split)
    state = tx.init(params)
    state = state._replace(
        num_steps=jax.device_put(state.num_steps, copied),
        report=jax.device_put(state.report, copied),
    )
    history = loop(tx, params, jax.device_put(GRADIENTS, split), state, jit=True)
    for (moved, after), (expected, single) in zip(
        history, loop(tx, jit=True), strict=True
    ):
        # The programs differ in what XLA fuses with the report.
        assert_close(moved, expected)
        assert_close(after.inner_state, single.inner_state)
        for leaf in jax.tree.leaves((moved, after.inner_state)):
            assert leaf.sharding.is_equivalent_to(split, leaf.ndim)
        for name in ("ruled_by_eps", "at_cap", "lost_to_rounding", "zero_gradients"):
            assert_same_bits(getattr(after.report, name), getattr(single.report, name))


# What is read here is decided before the code of the processor is generated.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
ONE_LEAF = [jax.ShapeDtypeStruct((4000, 4000), jnp.float32)]
ALONE = {
    "rmsprop": functools.partial(optax_rms.rmsprop, 1e-3),
    "momentum": functools.partial(optax_rms.rmsprop, 1e-3, momentum=0.9),
    "centered": functools.partial(optax_rms.rmsprop, 1e-3, centered=True),
    "adam": functools.partial(optax.adam, 1e-3),
    "compressed": lambda: optax_rms.compress_state(
        optax_rms.rmsprop(1e-3), nu=optax_rms.UE6M2
    ),
}


def compiled(tx, params, gradient=None, *inputs):
    """A donated step; without ``gradient`` that of the optimizer alone."""

    def step(params, state, *inputs):
        gradients = inputs[0] if gradient is None else gradient(params, *inputs)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    inputs = inputs or (params,)
    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, *inputs)
    return lowered.compile(compiler_options=QUICK)


def added(inner, intervals, *rest):
    """What monitoring adds to the bytes of a step, as a share of them, on average.

    XLA's figure of a conditional is that of its more expensive branch; the other one
    hands the report on.
    """

    def bytes_of(tx):
        return compiled(tx, *rest).cost_analysis()["bytes accessed"]

    plain = bytes_of(inner)
    assert plain > 0
    monitored = [bytes_of(monitor(inner, n, eps=1e-8, decay=0.9)) for n in intervals]
    return [(m - plain) / n / plain for m, n in zip(monitored, intervals, strict=True)]


@pytest.mark.parametrize("name", first_by_default(ALONE))
def test_a_report_every_fifty_steps_adds_two_percent_to_an_update_alone(name):
    (share,) = added(ALONE[name](), [50], ONE_LEAF)
    assert 0 < share <= 0.02


@pytest.mark.parametrize("name", first_by_default(ALONE))
def test_a_step_without_report_moves_nothing_more(name):
    """No copy of parameters or moments, and no room: but for the conditional, which
    names its arrays, the program is that of the update alone."""
    inner = ALONE[name]()
    plain = compiled(inner, ONE_LEAF)
    monitored = compiled(monitor(inner, 50, eps=1e-8, decay=0.9), ONE_LEAF)
    program = monitored.as_text()
    before, _, after = program.partition("\nENTRY ")
    lines = [line for line in after.splitlines() if " conditional(" not in line]
    without = before + "\nENTRY " + "\n".join(lines)
    small = 2**16
    assert moved_bytes(without) <= moved_bytes(plain.as_text()) + small
    memory = monitored.memory_analysis().temp_size_in_bytes
    assert memory <= plain.memory_analysis().temp_size_in_bytes + 2**20


def called(program, text):
    """The computations that the instructions in a part of a program call."""
    for name in re.findall(r"(?:calls|to_apply)=(%[\w.-]+)", text):
        body = program.split(f"\n{name} (", 1)[1].split("\n}", 1)[0]
        yield body
        yield from called(program, body)


def sampled_bytes(program):
    """Bytes of arrays of which an instruction reads a sample, and XLA counts all.

    Without a reduction in it, an instruction reads no more elements of an array than it
    writes, and these write the 4,096 elements of a sample at most.
    """
    types = {name: type for name, type, _, _ in instructions(program)}
    total = 0
    for name, type, operation, operands in launches(program):
        if operation in ("fusion", "call") and bytes_in_memory(type) <= 4 * 4096:
            line = re.search(rf"\s{re.escape(name)} = .*", program)[0]
            if not any(" reduce(" in body for body in called(program, line)):
                read = dict.fromkeys(re.findall(r"%[^\s,]+", operands))
                total += sum(bytes_in_memory(types[name]) for name in read)
    return total


@pytest.mark.parametrize(
    ("name", "moved", "read"),
    [("rmsprop", 28, 12), ("adam", 40, 16), ("compressed", 21, 9)],
)
def test_a_report_reads_gradient_parameter_and_moments_once(name, moved, read):
    """By element: the least that sums over them can read in a pass of their own.

    For an update alone that is 40 % of its bytes or more, and 30 % cannot be reached.
    """
    plain = compiled(ALONE[name](), ONE_LEAF).as_text()
    monitored = compiled(monitor(ALONE[name](), eps=1e-8, decay=0.9), ONE_LEAF)
    program = monitored.as_text()
    elements = ONE_LEAF[0].size
    assert moved_bytes(plain) == pytest.approx(moved * elements, rel=1e-3)
    assert sampled_bytes(program) > 0
    extra = moved_bytes(program) - sampled_bytes(program) - moved_bytes(plain)
    assert extra == pytest.approx(read * elements, rel=2e-3)


def training_steps():
    network = characters.Transformer(vocabulary=90, width=64, depth=2)
    windows = jax.ShapeDtypeStruct((16, characters.CONTEXT + 1), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0), windows)
    gradient = jax.grad(lambda p, windows: characters.loss(p, network, windows))
    yield "transformer", params, gradient, windows
    classifier = digits.Network()
    images = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    labels = jax.ShapeDtypeStruct((32,), jnp.int32)
    params = jax.eval_shape(classifier.init, jax.random.key(0), images)

    def loss(params, images, labels):
        examples = digits.Examples(images, labels)
        return digits.loss_and_accuracy(params, classifier.apply, examples)[0]

    yield "digits", params, jax.grad(loss), images, labels


TRAINING_STEPS = {name: rest for name, *rest in training_steps()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limits"),
    [("transformer", {1: 0.30, 50: 0.02}), ("digits", {50: 0.02})],
)
def test_a_report_adds_little_to_a_training_step(name, limits):
    """By the number of steps from one report to the next."""
    shares = added(optax_rms.rmsprop(1e-3), limits, *TRAINING_STEPS[name])
    for share, limit in zip(shares, limits.values(), strict=True):
        assert 0 < share <= limit


@pytest.mark.parametrize(
    ("every", "error", "message"),
    [
        (0, ValueError, "every must be at least 1"),
        (1.5, TypeError, "every must be an int of at least 1"),
        (True, TypeError, "every must be an int"),
    ],
)
def test_bad_interval_is_named(every, error, message):
    with pytest.raises(error, match=message):
        monitor(optax.sgd(0.1), every)


def test_bad_options_are_named_by_init():
    with pytest.raises(ValueError, match="eps must be a finite number"):
        monitor(optax.sgd(0.1), eps=-1.0).init(PARAMS)


def test_missing_parameters_and_foreign_states_are_named():
    tx = monitor(optax.sgd(0.1))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="monitor needs the parameters"):
        tx.update(GRADIENTS[0], state)
    with pytest.raises(TypeError, match="monitor needs the MonitorState"):
        tx.update(GRADIENTS[0], state.inner_state, PARAMS)


def test_states_without_one_report_are_named():
    tx = monitor(optax.sgd(0.1))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="no report before the first step"):
        read_report(state)
    with pytest.raises(ValueError, match="there are 0 in this tuple"):
        read_report(state.inner_state)
    with pytest.raises(ValueError, match="there are 2 in this tuple"):
        read_report((state, state))
