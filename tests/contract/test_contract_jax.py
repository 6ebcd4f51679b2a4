# SPDX-License-Identifier: Apache-2.0
"""The contract with JAX: its transformations, compilation and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers.contract_rows import every_row
from helpers.training import (
    GRADIENTS,
    PARAMS,
    assert_close,
    assert_same_bits,
    at,
    jitted,
    loop,
    plain,
    stack,
    step,
)


@every_row
def test_jit_without_retrace(row):
    for actual, expected in zip(jitted(row), plain(row), strict=True):
        assert_close(actual, expected)


@every_row
def test_scan(row):
    tx = row()

    @jax.jit
    def run(params, gradients):
        def body(carry, g):
            carry = step(tx, *carry, g)
            return carry, carry

        return jax.lax.scan(body, (params, tx.init(params)), gradients)[1]

    history = run(PARAMS, stack(GRADIENTS))
    for t, expected in enumerate(plain(row)):
        assert_close(at(history, t), expected)


# The first gradient is zero.
STREAM = [jnp.zeros(16), *(g["bias"] for g in GRADIENTS[1:])]


@functools.cache
def derivative_of(row):
    """Of the sum of the parameters after training, by the numbers and a scale of g."""

    def last(numbers, scale):
        tx, start = row(**numbers), PARAMS["bias"]

        def body(carry, g):
            return step(tx, *carry, scale * g), None

        carry, _ = jax.lax.scan(body, (start, tx.init(start)), jnp.stack(STREAM))
        return jnp.sum(carry[0])

    return jax.jit(jax.grad(last, argnums=(0, 1)))


@every_row
def test_grad_is_finite(row):
    """Through steps that start from a zero gradient, also where eps is 0."""
    for eps in (0.0, 1e-8):
        slopes = derivative_of(row)({**row.numbers, row.eps: eps}, 1.0)
        assert all(np.isfinite(s) for s in jax.tree.leaves(slopes))
        assert any(s != 0 for s in jax.tree.leaves(slopes))


@every_row
def test_grad_is_finite_difference(row):
    # At an eps below the squared gradients the trajectory hardly feels their scale.
    numbers = {**row.numbers, row.eps: 0.1}

    def value(scale):
        gradients = [scale * g for g in STREAM]
        params, _ = loop(row(**numbers), PARAMS["bias"], gradients)[-1]
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
    def run(numbers):
        return loop(row(**numbers), gradients=GRADIENTS[:2])[-1]

    together = run({name: jnp.array(both) for name, both in values.items()})
    for i in range(2):
        numbers = {name: both[i] for name, both in values.items()}
        alone = loop(row(**numbers), gradients=GRADIENTS[:2])[-1]
        # 1 - decay of a traced decay of 0.8 is exact to an ulp of 1 only.
        assert_close(at(together, i), alone, loss=5)


@every_row
def test_vmap_over_params(row):
    tx = row()

    @jax.jit
    @jax.vmap
    def run(params, first, second):
        return loop(tx, params, [first, second])[-1]

    params = [PARAMS, jax.tree.map(lambda x: 2 - x, PARAMS)]
    gradients = [GRADIENTS[:2], GRADIENTS[2:]]
    together = run(stack(params), *map(stack, zip(*gradients, strict=True)))
    for i in range(2):
        assert_close(at(together, i), loop(tx, params[i], gradients[i])[-1])


@every_row
def test_sharded_over_eight_devices(row):
    """The same bits as on one device, and moments that lie where the parameters do."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("devices",))
    assert mesh.size == 8
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    copied = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = row()
    params = jax.device_put(PARAMS, split)
    # A step count lies on one device at first, and would be moved by the first step.
    state = jax.tree.map(
        lambda x: x if x.shape else jax.device_put(x, copied), tx.init(params)
    )
    gradients = jax.device_put(GRADIENTS, split)
    history = loop(tx, params, gradients, state, jit=True)
    for sharded, single in zip(history, jitted(row), strict=True):
        assert_same_bits(sharded, single)
    for leaf in jax.tree.leaves((state, history)):
        if leaf.shape:
            assert leaf.sharding.is_equivalent_to(split, leaf.ndim)
