# SPDX-License-Identifier: Apache-2.0
"""`state_shardings`: for every transformation, and what a step with it moves."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.contract_rows import every_row
from helpers.running import at, step
from helpers.training import GRADIENTS, PARAMS, STEPS
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_rms import (
    UE6M2,
    compress_state,
    dialects,
    rmsprop,
    split_master_weights,
    state_shardings,
)

MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def place(tree, **specs):
    """A tree on the mesh: leaves by their spec, or replicated."""
    shardings = {k: NamedSharding(MESH, PartitionSpec(*specs.get(k, ()))) for k in tree}
    return jax.device_put(tree, shardings)


def specs_by_shape(state, shardings):
    """The specs of the arrays of each shape; structures must agree."""
    found = {}
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        found.setdefault(x.shape, set()).add(s.spec)
    chex.assert_trees_all_equal_structs(state, shardings)
    return found


@every_row
def test_every_transformation(row):
    """Here kernel is (8, 2) and bias (16,); the axes data and model are 4 and 2."""
    tx = row()
    params = place(PARAMS, kernel=(None, "model"))
    cases = {
        None: {(8, 2): PartitionSpec(None, "model"), (16,): PartitionSpec()},
        "data": {(8, 2): PartitionSpec("data", "model"), (16,): PartitionSpec("data")},
        "model": {(8, 2): PartitionSpec(None, "model"), (16,): PartitionSpec("model")},
    }
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )
    for over, expected in cases.items():
        shardings = state_shardings(tx, params, over=over)
        assert jax.tree.leaves(shardings) == jax.tree.leaves(
            state_shardings(tx, abstract, over=over)
        )
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        found = specs_by_shape(state, shardings)
        ours = {shape: found.pop(shape) for shape in expected}
        assert ours == {shape: {spec} for shape, spec in expected.items()}
        # Step counts and reports belong to no parameter.
        assert all(specs == {PartitionSpec()} for specs in found.values())
        chex.assert_trees_all_equal(state, row().init(PARAMS))


@every_row
def test_a_split_state_gives_the_bits_of_a_whole_one(row):
    """The updates are gathered once, and nothing else moves between devices."""
    tx = row()
    params, whole, gradients = (
        place(PARAMS),
        place(PARAMS),
        [place(at(GRADIENTS, t)) for t in range(STEPS)],
    )
    shardings = state_shardings(tx, params, over="data", strict=True)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    whole_state = jax.device_put(tx.init(PARAMS), NamedSharding(MESH, PartitionSpec()))
    replicated = jax.tree.map(lambda p: p.sharding, params)
    split_step = jax.jit(
        lambda p, s, g: step(tx, p, s, g), out_shardings=(replicated, shardings)
    )
    whole_step = jax.jit(lambda p, s, g: step(tx, p, s, g))
    for g in gradients:
        params, state = split_step(params, state, g)
        whole, whole_state = whole_step(whole, whole_state, g)
        chex.assert_trees_all_equal((params, state), (whole, whole_state))
    shapes = {p.shape for p in PARAMS.values()}
    for x in jax.tree.leaves(state):
        part = x.addressable_shards[0].data.nbytes / x.nbytes
        assert part == (1 / 4 if x.shape in shapes else 1)
    program = split_step.lower(params, state, gradients[0]).compile().as_text()
    collectives = re.findall(
        r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", program
    )
    # The parameters, each once.
    assert set(collectives) <= {"all-gather"} | row_collectives(row)


def row_collectives(row):
    """timm's caution counts the signs of a whole leaf, and a report sums over it."""
    return {"all-reduce"} if row.name in ("timm", "monitor") else set()


def test_dimensions_that_do_not_divide_stay_with_their_parameter():
    params = place({"a": jnp.ones((3, 8)), "b": jnp.ones(6), "c": jnp.ones(())})
    tx = optax.adam(0.1)
    nu = state_shardings(tx, params, over="data")[0].nu
    assert nu["a"].spec == PartitionSpec(None, "data")
    assert nu["b"].spec == nu["c"].spec == PartitionSpec()
    with pytest.raises(ValueError, match=r"\['b'\] float32\[6\], \['c'\] float32\[\]"):
        state_shardings(tx, params, over="data", strict=True)
    empty = place({"e": jnp.ones((0, 4))})
    assert state_shardings(tx, empty, over="data")[0].nu["e"].spec == PartitionSpec(
        None, "data"
    )


MASK = {"w": True, "absent": False}


def test_trees_of_all_kinds():
    """Integers without state, complex pairs, masks, arrays of other shapes."""
    params = place(
        {"w": jnp.ones((8, 4)), "n": jnp.arange(4), "z": jnp.ones(8, jnp.complex64)},
        w=("model",),
    )
    params["absent"] = None
    for tx in (
        rmsprop(0.1, momentum=0.9),
        dialects.torch.rmsprop(momentum=0.9),
        optax.masked(
            rmsprop(0.1), {"w": True, "n": False, "z": False, "absent": False}
        ),
        compress_state(rmsprop(0.1), nu=UE6M2),
    ):
        shardings = state_shardings(tx, params, over="data")
        specs = specs_by_shape(jax.eval_shape(tx.init, params), shardings)
        assert specs[(8, 4)] == {PartitionSpec(("model", "data"))}
        assert specs.get((8,), {PartitionSpec("data")}) == {PartitionSpec("data")}
    half = place({"w": jnp.ones((8, 4), jnp.bfloat16)})
    split = split_master_weights(optax.adam(0.1))
    specs = specs_by_shape(
        jax.eval_shape(split.init, half), state_shardings(split, half, over="data")
    )
    assert specs[(8, 4)] == {PartitionSpec("data")}
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    big = place({"w": jnp.ones((8, 4))}, w=("model",))
    specs = specs_by_shape(
        jax.eval_shape(factored.init, big), state_shardings(factored, big, over="data")
    )
    assert specs[(8,)] == specs[(4,)] == {PartitionSpec()}


def test_explicit_mesh():
    axes = (jax.sharding.AxisType.Explicit,) * 2
    mesh = Mesh(MESH.devices, MESH.axis_names, axis_types=axes)
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    params = jax.device_put({"w": jnp.ones((8, 4))}, sharding)
    tx = rmsprop(0.1, momentum=0.9)
    shardings = state_shardings(tx, params, over="data")
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert state[0].nu["w"].sharding.spec == PartitionSpec(("model", "data"))


def test_refused():
    params = place({"w": jnp.ones(8)})
    with pytest.raises(ValueError, match=r"over must be .*'model'\), got 'x'"):
        state_shardings(rmsprop(0.1), params, over="x")
    with pytest.raises(ValueError, match=r"\['w'\] must have a NamedSharding, got"):
        state_shardings(rmsprop(0.1), {"w": jnp.ones(8)})
    other = Mesh(np.array(jax.devices()), ("data",))
    params["b"] = jax.device_put(jnp.ones(8), NamedSharding(other, PartitionSpec()))
    with pytest.raises(ValueError, match=r"one mesh, got \['b'\] on .*\['w'\] on"):
        state_shardings(rmsprop(0.1), params)
    with pytest.raises(ValueError, match="got no arrays"):
        state_shardings(rmsprop(0.1), {})
