# SPDX-License-Identifier: Apache-2.0
"""`shard_state`: bits, bytes and collectives, for loops that know nothing of it."""

import collections
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers.comparison import assert_same_bits
from helpers.running import at, step
from helpers.training import GRADIENTS, PARAMS
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optax_rms import (
    UE6M2,
    compress_state,
    dialects,
    rmsprop,
    shard_state,
    split_master_weights,
    state_shardings,
)

NAMES = ("data", "model")
DEVICES = np.array(jax.devices()).reshape(4, 2)
MESHES = {
    kind: Mesh(DEVICES, NAMES, axis_types=(kind,) * 2)
    for kind in (AxisType.Auto, AxisType.Explicit)
}
REPLICATED = {"kernel": PartitionSpec(), "bias": PartitionSpec()}
MODEL = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}


def place(mesh, specs, tree):
    return jax.device_put(tree, {k: NamedSharding(mesh, s) for k, s in specs.items()})


def collectives(program):
    """How many there are of each kind in a compiled program."""
    kinds = r" (all-\w+(?:-\w+)?|reduce-scatter|collective-\w+)(?:-start)?\("
    return collections.Counter(re.findall(kinds, program.as_text()))


def bytes_on_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
TORCH = dialects.torch.rmsprop(0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize(
    ("inner", "kind", "specs"),
    [
        pytest.param(TORCH, AUTO, REPLICATED, id="auto-replicated"),
        pytest.param(
            compress_state(rmsprop(0.1, momentum=0.9), nu=UE6M2),
            *(AUTO, MODEL),
            id="auto-model",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            optax.rmsprop(0.1, momentum=0.9),
            *(EXPLICIT, REPLICATED),
            id="explicit-replicated",
        ),
        pytest.param(TORCH, EXPLICIT, MODEL, id="explicit-model"),
    ],
)
def test_bits_bytes_and_collectives_of_a_step(inner, kind, specs):
    """Those of a run in one piece; a part of the state; one gather of each update."""
    mesh = MESHES[kind]
    is_told = kind == AUTO and specs is not REPLICATED
    tx = shard_state(inner, mesh, "data", specs if is_told else None)
    params = place(mesh, specs, PARAMS)
    expected = state_shardings(inner, params, over="data", strict=True)
    state = jax.jit(tx.init)(params)
    chex.assert_trees_all_equal(state, tx.init(params))
    whole, whole_state = PARAMS, inner.init(PARAMS)
    # In one program with the update, XLA rounds its last product and the sum of it and
    # the parameter only once. A gather is between the two here.
    update, apply = jax.jit(inner.update), jax.jit(optax.apply_updates)
    gradients = place(mesh, specs, at(GRADIENTS, 0))
    program = (
        jax.jit(lambda p, s, g: step(tx, p, s, g))
        .lower(params, state, gradients)
        .compile()
    )
    for t in range(3):
        gradients = place(mesh, specs, at(GRADIENTS, t))
        params, state = program(params, state, gradients)
        updates, whole_state = update(at(GRADIENTS, t), whole_state, whole)
        whole = apply(whole, updates)
        assert_same_bits((params, state), (whole, whole_state))
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)
        for name, p in params.items():
            assert p.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), p.ndim)
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    parts = 4 if specs is REPLICATED else 8
    assert bytes_on_device(arrays) * parts == sum(x.nbytes for x in arrays)
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == bytes_on_device((params, state, gradients))
    assert collectives(program) == {"all-gather": len(PARAMS)}


def loss(params, batch):
    return jnp.mean((batch @ params["kernel"] + params["bias"]) ** 2)


def test_a_step_of_data_parallelism():
    """The reductions of a run without the wrapper, and one gather of each update."""
    mesh = MESHES[AUTO]
    params = {"kernel": jnp.ones((16, 8)), "bias": jnp.ones(8)}
    params = place(mesh, REPLICATED, params)
    batch = jax.device_put(
        jnp.ones((32, 16)), NamedSharding(mesh, PartitionSpec("data"))
    )
    found = []
    for tx in (TORCH, shard_state(TORCH, mesh, "data")):

        def train(params, state, batch, tx=tx):
            value, gradients = jax.value_and_grad(loss)(params, batch)
            return *step(tx, params, state, gradients), value

        state = jax.jit(tx.init)(params)
        found.append(collectives(jax.jit(train).lower(params, state, batch).compile()))
    alone, split = found
    assert set(alone) == {"all-reduce"}
    assert split == alone + collections.Counter({"all-gather": len(params)})


def test_train_state():
    """Flax calls `init` and `update`; the step is compiled once."""
    mesh = MESHES[AUTO]
    params = place(mesh, REPLICATED, PARAMS)
    tx = shard_state(TORCH, mesh, "data")
    train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
    train_state = train_state.replace(
        step=jax.device_put(0, NamedSharding(mesh, PartitionSpec()))
    )
    chex.clear_trace_counter()
    train = jax.jit(chex.assert_max_traces(TrainState.apply_gradients, n=1))
    for t in range(2):
        gradients = place(mesh, REPLICATED, at(GRADIENTS, t))
        train_state = train(train_state, grads=gradients)
    parts = [x for x in jax.tree.leaves(train_state.opt_state) if x.ndim]
    assert {x.nbytes // bytes_on_device(x) for x in parts} == {4}
    assert all(p.sharding.is_fully_replicated for p in train_state.params.values())


@pytest.mark.skipif(
    not hasattr(jax, "set_mesh"), reason="jax.eval_shape of JAX 0.6 has no shardings"
)
def test_moments_of_other_shapes_are_whole_before_and_after_a_step():
    mesh = MESHES[EXPLICIT]
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    params = place(mesh, {"w": PartitionSpec()}, {"w": jnp.ones((8, 4))})
    tx = shard_state(inner, mesh, "data")
    with jax.set_mesh(mesh):  # Optax makes these moments with shardings of the mesh.
        state = jax.eval_shape(tx.init, params)
        _, after = jax.eval_shape(tx.update, params, state, params)
    for moments in (state, after):
        factors = jax.tree.leaves((moments.v_row, moments.v_col))
        assert {x.shape for x in factors} == {(8,), (4,)}
        assert {tuple(x.sharding.spec) for x in factors} == {(None,)}


def test_nnx_optimizer():
    mesh = MESHES[AUTO]
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    replicated = NamedSharding(mesh, PartitionSpec())
    nnx.update(model, jax.device_put(nnx.state(model), replicated))
    optimizer = nnx.Optimizer(model, shard_state(TORCH, mesh, "data"), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        gradients = nnx.grad(lambda m: jnp.mean(m(jnp.ones((2, 8))) ** 2))(model)
        optimizer.update(model, gradients)

    train(model, optimizer)
    parts = [x for x in jax.tree.leaves(nnx.state(optimizer)) if x.ndim]
    assert len(parts) == 4
    assert {x.nbytes // bytes_on_device(x) for x in parts} == {4}
    # The older partitioner, the default of JAX 0.6, may leave new parameters in parts.
    if getattr(jax.config, "jax_use_shardy_partitioner", True):
        params = jax.tree.leaves(nnx.state(model))
        assert all(p.sharding.is_fully_replicated for p in params)


def test_parameters_that_do_not_divide_are_whole_and_listed():
    mesh = MESHES[AUTO]
    params = {"a": jnp.ones((3, 8)), "b": jnp.ones(6), "n": jnp.arange(6), "z": None}
    state = shard_state(TORCH, mesh, "data").init(params)
    trace = state[1].trace
    assert trace["a"].sharding.spec == PartitionSpec(None, "data")
    assert trace["b"].sharding.is_fully_replicated
    with pytest.raises(ValueError, match=r"of 'data': \['b'\] float32\[6\]\."):
        shard_state(TORCH, mesh, "data", strict=True).init(params)


def test_abstract_state():
    tx = shard_state(split_master_weights(TORCH), MESHES[AUTO], "data")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    shapes = jax.eval_shape(lambda: params)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(params))
    for state in (tx.init(shapes), jax.eval_shape(tx.init, shapes)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == expected
    replicated = optax.tree_map_params(
        tx,
        lambda x: x.sharding.is_fully_replicated,
        tx.init(PARAMS),
        transform_non_params=lambda x: False,
    )
    assert not any(jax.tree.leaves(replicated))


def test_refused():
    mesh, other = MESHES[AUTO], Mesh(np.array(jax.devices()), ("data",))
    with pytest.raises(TypeError, match=r"mesh must be .*Mesh, .* got 'data'"):
        shard_state(TORCH, "data", "data")
    with pytest.raises(ValueError, match=r"over must be .*'model'\), got 'x'"):
        shard_state(TORCH, mesh, "x")
    with pytest.raises(ValueError, match=r"over must be .*got None"):
        shard_state(TORCH, mesh, None)
    mixed = Mesh(DEVICES, NAMES, axis_types=(AUTO, EXPLICIT))
    with pytest.raises(ValueError, match=r"of type Explicit, got {'data': 'Auto'"):
        shard_state(TORCH, mixed, "data")
    with pytest.raises(ValueError, match="specs must be None on a mesh of type Expl"):
        shard_state(TORCH, MESHES[EXPLICIT], "data", MODEL)
    for specs, found in (
        ({"kernel": PartitionSpec("x"), "bias": PartitionSpec()}, "PartitionSpec"),
        ({"kernel": "model", "bias": PartitionSpec()}, "'model'"),
    ):
        tx = shard_state(TORCH, mesh, "data", specs)
        with pytest.raises(ValueError, match=rf"\['kernel'\] must be .*{found}"):
            tx.init(PARAMS)
    with pytest.raises(ValueError, match="specs must be a PartitionSpec, or a tree"):
        shard_state(TORCH, mesh, "data", {"kernel": PartitionSpec()}).init(PARAMS)
    # A compiled step would gather the updates over all axes, and nobody would know.
    params = place(mesh, MODEL, PARAMS)
    with pytest.raises(
        ValueError, match=r"as specs says.*\['bias'\] lies as .*'model'"
    ):
        shard_state(TORCH, mesh, "data").init(params)
    elsewhere = place(other, REPLICATED, PARAMS)
    with pytest.raises(ValueError, match=r"must lie on the mesh of shard_state"):
        shard_state(TORCH, mesh, "data").init(elsewhere)
