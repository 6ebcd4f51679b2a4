# SPDX-License-Identifier: Apache-2.0
"""The contract with Optax: whatever wraps a transformation wraps these."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from helpers.contract_rows import every_row
from helpers.training import (
    GRADIENTS,
    PARAMS,
    STEPS,
    assert_close,
    loop,
    plain,
    step,
)


def final(tx, **options):
    params, _ = loop(tx, **options)[-1]
    return params


@every_row
def test_chain(row):
    tx = optax.chain(optax.scale(-2.0), row(), optax.scale(0.5))
    gradients = [jax.tree.map(lambda x: -2 * x, g) for g in GRADIENTS]
    params, inner = PARAMS, row()
    state = inner.init(params)
    for g in gradients:
        updates, state = inner.update(g, state, params)
        params = jax.tree.map(lambda p, u: p + 0.5 * u, params, updates)
    assert_close(final(tx), params)


@every_row
def test_extra_arguments(row):
    """As `optax.rmsprop`, which a loop may hand the loss for what else is chained."""
    tx = row()
    updates, _ = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS, value=jnp.array(1.0))
    expected, _ = tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    assert_close(updates, expected)


@every_row
def test_masked(row):
    tx = optax.masked(row(), {"kernel": True, "bias": False})
    expected = dict(plain(row)[-1][0])
    expected["bias"] = sum((g["bias"] for g in GRADIENTS), PARAMS["bias"])
    assert_close(final(tx), expected)


@every_row
def test_partition(row):
    halved = {name: value / 2 for name, value in row.numbers.items()}
    transforms = {"one": row(), "other": row(**halved)}
    expected = {
        "kernel": plain(row)[-1][0]["kernel"],
        "bias": final(row(**halved))["bias"],
    }
    for wrapper in (optax.partition, optax.multi_transform):
        tx = wrapper(transforms, {"kernel": "one", "bias": "other"})
        assert_close(final(tx), expected)


@every_row
def test_multi_steps(row):
    """The mean of two gradients, one step; after each first half nothing moves."""
    tx = optax.MultiSteps(row(), 2).gradient_transformation()
    halves = [
        jax.tree.map(lambda x, sign=sign: x + sign * 0.25, g)
        for g in GRADIENTS
        for sign in (-1, 1)
    ]
    with jax.numpy_dtype_promotion("standard"):  # Optax divides by an integer.
        history = [params for params, _ in loop(tx, gradients=halves, jit=True)]
    expected = [params for params, _ in plain(row)]
    assert_close(history[1::2], expected)
    assert_close(history[::2], [PARAMS, *history[1:-1:2]])


@every_row
def test_apply_if_finite(row):
    """A step with a NaN is left out, as if it had never been."""
    spoilt = jax.tree.map(lambda x: x.at[0].set(jnp.nan), GRADIENTS[1])
    gradients = [GRADIENTS[0], spoilt, *GRADIENTS[1:]]
    tx = optax.apply_if_finite(row(), max_consecutive_errors=3)
    params, state = loop(tx, gradients=gradients, jit=True)[-1]
    assert state.total_notfinite == 1
    assert_close((params, state.inner_state), plain(row)[-1])


@every_row
def test_inject_hyperparams(row):
    tx = optax.inject_hyperparams(row.build)(**row.numbers, **row.options)
    for jit in (False, True):
        params, state = loop(tx, jit=jit)[-1]
        # 1 - decay of a traced decay of 0.8 is exact to an ulp of 1 only.
        assert_close(params, plain(row)[-1][0], loss=5)
        assert row.numbers.keys() <= state.hyperparams.keys()

    name, value = next(iter(row.numbers.items()))
    state.hyperparams[name] = jnp.float32(value / 2)
    # What was a schedule is a number now.
    held = {n: state.hyperparams[n] for n, v in row.options.items() if callable(v)}
    changed = row(**{name: value / 2}, **held)
    expected, _ = step(changed, params, state.inner_state, GRADIENTS[0])
    assert_close(step(tx, params, state, GRADIENTS[0])[0], expected, loss=5)


@every_row
def test_lookahead(row):
    tx = optax.lookahead(row(), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    inner, fast, slow = row(), PARAMS, PARAMS
    inner_state = inner.init(fast)
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies by a boolean.
        history = loop(tx, params)
    for t, g in enumerate(GRADIENTS):
        fast, inner_state = step(inner, fast, inner_state, g)
        if t % 2:
            slow = jax.tree.map(lambda f, s: s + 0.5 * (f - s), fast, slow)
            fast = slow
        assert_close(history[t][0], optax.LookaheadParams(fast, slow))
    assert_close(history[-1][1].fast_state, inner_state)


@every_row
def test_schedule_free(row):
    """At a constant rate it stands at 0.9 of the mean iterate plus 0.1 of the last."""
    tx = optax.contrib.schedule_free(row(), learning_rate=1.0, b1=0.9)
    iterates = [params for params, _ in plain(row)]
    mean = jax.tree.map(lambda *z: sum(z) / STEPS, *iterates)
    expected = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z, mean, iterates[-1])
    params, state = loop(tx)[-1]
    assert_close(params, expected)
    evaluated = optax.contrib.schedule_free_eval_params(state, params)
    assert_close(evaluated, mean)


@every_row
def test_flatten(row):
    assert_close(final(optax.flatten(row())), plain(row)[-1][0])


@every_row
def test_tree_map_params(row):
    """What is shaped like the parameters is mapped next to them, the rest apart."""
    tx, state = row(), plain(row)[-1][1]
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
