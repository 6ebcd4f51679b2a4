# SPDX-License-Identifier: Apache-2.0
"""The contract with Optax: whatever wraps a transformation wraps these."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers.contract_rows import every_row
from helpers.running import at, run, step
from helpers.training import GRADIENTS, PARAMS, STEPS, assert_close, plain

FIRST = at(GRADIENTS, 0)


def final(tx, gradients=GRADIENTS):
    params, _ = run(tx, gradients, PARAMS).last
    return params


@every_row
def test_chain(row):
    tx = optax.chain(optax.scale(-2.0), row(), optax.scale(0.5))
    params, inner = PARAMS, row()
    state = inner.init(params)
    for t in range(STEPS):
        gradients = jax.tree.map(lambda g: -2 * g, at(GRADIENTS, t))
        updates, state = inner.update(gradients, state, params)
        params = jax.tree.map(lambda p, u: p + 0.5 * u, params, updates)
    assert_close(final(tx), params)


@every_row
def test_extra_arguments(row):
    """As `optax.rmsprop`, which a loop may hand the loss for what else is chained."""
    tx = row()
    updates, _ = tx.update(FIRST, tx.init(PARAMS), PARAMS, value=jnp.array(1.0))
    expected, _ = tx.update(FIRST, tx.init(PARAMS), PARAMS)
    assert_close(updates, expected)


@every_row
def test_masked(row):
    tx = optax.masked(row(), {"kernel": True, "bias": False})
    expected = dict(plain(row).last[0])
    expected["bias"] = sum(GRADIENTS["bias"], PARAMS["bias"])
    assert_close(final(tx), expected)


@every_row
def test_partition(row):
    halved = {name: value / 2 for name, value in row.numbers.items()}
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "one": row(),
        "other": row(**halved),
    }
    expected = {
        "kernel": plain(row).last[0]["kernel"],
        "bias": final(row(**halved))["bias"],
    }
    for wrapper in (optax.partition, optax.multi_transform):
        tx = wrapper(transforms, {"kernel": "one", "bias": "other"})
        assert_close(final(tx), expected)


@every_row
def test_multi_steps(row):
    """The mean of two gradients, one step; after each first half nothing moves."""
    tx = optax.MultiSteps(row(), 2).gradient_transformation()
    halves = jax.tree.map(
        lambda g: jnp.stack([g - 0.25, g + 0.25], axis=1).reshape(-1, *g.shape[1:]),
        GRADIENTS,
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax divides by an integer.
        params = run(tx, halves, PARAMS, how="jit").params
    first, second = (at(params, slice(i, None, 2)) for i in range(2))
    assert_close(second, plain(row).params)
    assert_close(at(first, 0), PARAMS)
    assert_close(at(first, slice(1, None)), at(second, slice(-1)))


@every_row
def test_apply_if_finite(row):
    """A step with a NaN is left out, as if it had never been."""
    gradients = jax.tree.map(lambda g: g[jnp.array([0, 1, 1, 2, 3])], GRADIENTS)
    gradients = jax.tree.map(lambda g: g.at[1, 0].set(jnp.nan), gradients)
    tx = optax.apply_if_finite(row(), max_consecutive_errors=3)
    params, state = run(tx, gradients, PARAMS, how="jit").last
    assert state.total_notfinite == 1
    assert_close((params, state.inner_state), plain(row).last)


@pytest.mark.parametrize("how", ["eager", "jit"])
@every_row
def test_inject_hyperparams(row, how):
    tx = optax.inject_hyperparams(row.build)(**row.numbers, **row.options)
    params, state = run(tx, GRADIENTS, PARAMS, how=how).last
    # 1 - decay of a traced decay of 0.8 is exact to an ulp of 1 only.
    assert_close(params, plain(row).last[0], loss=5)
    assert row.numbers.keys() <= state.hyperparams.keys()

    name, value = next(iter(row.numbers.items()))
    state.hyperparams[name] = jnp.float32(value / 2)
    # What was a schedule is a number now.
    held = {n: state.hyperparams[n] for n, v in row.options.items() if callable(v)}
    changed = row(**{name: value / 2}, **held)
    expected, _ = step(changed, params, state.inner_state, FIRST)
    assert_close(step(tx, params, state, FIRST)[0], expected, loss=5)


@every_row
def test_lookahead(row):
    tx = optax.lookahead(row(), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    inner, fast, slow = row(), PARAMS, PARAMS
    inner_state = inner.init(fast)
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies by a boolean.
        history = run(tx, GRADIENTS, params)
    for t in range(STEPS):
        fast, inner_state = step(inner, fast, inner_state, at(GRADIENTS, t))
        if t % 2:
            slow = jax.tree.map(lambda f, s: s + 0.5 * (f - s), fast, slow)
            fast = slow
        assert_close(at(history.params, t), optax.LookaheadParams(fast, slow))
    assert_close(history.last[1].fast_state, inner_state)


@every_row
def test_schedule_free(row):
    """At a constant rate it stands at 0.9 of the mean iterate plus 0.1 of the last."""
    tx = optax.contrib.schedule_free(row(), learning_rate=1.0, b1=0.9)
    iterates = plain(row).params
    mean = jax.tree.map(lambda z: sum(z) / STEPS, iterates)
    expected = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z[-1], mean, iterates)
    params, state = run(tx, GRADIENTS, PARAMS).last
    assert_close(params, expected)
    evaluated = optax.contrib.schedule_free_eval_params(state, params)
    assert_close(evaluated, mean)


@every_row
def test_flatten(row):
    assert_close(final(optax.flatten(row())), plain(row).last[0])


@every_row
def test_tree_map_params(row):
    """What is shaped like the parameters is mapped next to them, the rest apart."""
    tx, state = row(), plain(row).last[1]
    mapped = optax.tree_map_params(
        tx,
        lambda x, p: x + p.astype(x.dtype),
        state,
        PARAMS,
        transform_non_params=lambda x: x + 7,
    )

    def expected(path, x):
        name = getattr(path[-1], "key", None)
        return x + PARAMS[name].astype(x.dtype) if name in PARAMS else x + 7

    assert_close(mapped, jax.tree_util.tree_map_with_path(expected, state))
    assert np.any([x.shape == PARAMS["bias"].shape for x in jax.tree.leaves(mapped)])
