# SPDX-License-Identifier: Apache-2.0
"""The contract with JAX: its transformations, compilation and sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from helpers.comparison import assert_same_bits
from helpers.contract_rows import every_row
from helpers.running import at, run, step
from helpers.training import GRADIENTS, PARAMS, STEPS, assert_close, plain

FIRST_TWO, LAST_TWO = at(GRADIENTS, slice(2)), at(GRADIENTS, slice(2, None))


@every_row
def test_jit_without_retrace(row):
    assert_close(run(row(), GRADIENTS, PARAMS, how="jit"), plain(row))


@every_row
def test_scan(row):
    assert_close(run(row(), GRADIENTS, PARAMS, how="scan"), plain(row))


# The first gradient is zero.
STREAM = GRADIENTS["bias"].at[0].set(0.0)


@functools.cache
def derivative_of(row):
    """Of the sum of the parameters after training, by the numbers and a scale of g."""

    def last(numbers, scale):
        tx = row(**numbers)
        params, _ = run(tx, scale * STREAM, PARAMS["bias"], how="scan").last
        return jnp.sum(params)

    return jax.jit(jax.grad(last, argnums=(0, 1)))


@every_row
def test_grad_is_finite(row):
    """Through steps that start from a zero gradient, also where eps is 0."""
    for eps in (0.0, 1e-8):
        slopes = derivative_of(row)({**row.numbers, row.eps: eps}, 1.0)
        chex.assert_tree_all_finite(slopes)
        assert any(s != 0 for s in jax.tree.leaves(slopes))


@every_row
def test_grad_is_finite_difference(row):
    # At an eps below the squared gradients the trajectory hardly feels their scale.
    numbers = {**row.numbers, row.eps: 0.1}

    def value(scale):
        params, _ = run(row(**numbers), scale * STREAM, PARAMS["bias"]).last
        return np.sum(np.asarray(params, np.float64))

    h = 1 / 64
    central = (value(1 + h) - value(1 - h)) / (2 * h)
    _, slope = derivative_of(row)(numbers, 1.0)
    # Sixteen numbers near 1 are good to 1e-6, which h makes 1e-4; h^2 itself is 2e-4.
    np.testing.assert_allclose(slope, central, rtol=2e-3, atol=2e-4)


@every_row
def test_vmap_over_numbers(row):
    values = {name: [value, value / 2] for name, value in row.numbers.items()}

    @jax.jit
    @jax.vmap
    def run_all(numbers):
        return run(row(**numbers), FIRST_TWO, PARAMS, how="scan")

    together = run_all({name: jnp.array(both) for name, both in values.items()})
    for i in range(2):
        numbers = {name: both[i] for name, both in values.items()}
        alone = run(row(**numbers), FIRST_TWO, PARAMS)
        # 1 - decay of a traced decay of 0.8 is exact to an ulp of 1 only.
        assert_close(at(together, i), alone, loss=5)


@every_row
def test_vmap_over_params(row):
    tx = row()

    @jax.jit
    @jax.vmap
    def run_all(params, gradients):
        return run(tx, gradients, params, how="scan")

    params = jax.tree.map(lambda x: jnp.stack([x, 2 - x]), PARAMS)
    gradients = jax.tree.map(lambda *g: jnp.stack(g), FIRST_TWO, LAST_TWO)
    together = run_all(params, gradients)
    for i in range(2):
        assert_close(at(together, i), run(tx, at(gradients, i), at(params, i)))


@every_row
def test_sharded_over_eight_devices(row):
    """The same bits as on one device, and moments that lie where the parameters do.

    Step counts and reports, which belong to no parameter, lie on every device.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    assert mesh.size == 8
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    copied = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = row()
    params = jax.device_put(PARAMS, split)
    shapes = {p.shape for p in PARAMS.values()}
    # A step count lies on one device at first, and would be moved by the first step.
    state = jax.tree.map(
        lambda x: x if x.shape in shapes else jax.device_put(x, copied), tx.init(params)
    )
    compiled = jax.jit(functools.partial(step, tx))
    alone = PARAMS, tx.init(PARAMS)
    for t in range(STEPS):
        gradients = at(GRADIENTS, t)
        alone = compiled(*alone, gradients)
        params, state = compiled(params, state, jax.device_put(gradients, split))
        assert_same_bits((params, state), alone)
        for leaf in jax.tree.leaves((params, state)):
            expected = split if leaf.shape in shapes else copied
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
