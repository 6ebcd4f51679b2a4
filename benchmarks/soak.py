# SPDX-License-Identifier: Apache-2.0
"""A million steps, counters at the ends of their ranges, and eight threads."""

import concurrent.futures
import functools
import gc
import resource
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_rms
from optax_rms import SE5M2, SE8M7, UE6M2, UE8M8, Minifloat

ELEMENTS = 64
DECAY = 0.99
# The noise of averages at this decay, as `Minifloat` states it.
STATED = {
    "UE6M2": (UE6M2, 0.138),
    "UE8M8": (UE8M8, 0.0042),
    "SE5M2": (SE5M2, 0.57),
    "SE8M7": (SE8M7, 0.017),
}


def drift(name: str, steps: int, blocks: int = 10) -> dict[str, Any]:
    """A stored moving average beside that in float32, for ``steps`` steps.

    Returns:
      ``bias``: of each block of steps, the mean of the stored average minus that of the
      exact average, over the root mean square of the latter; ``noise``: as `Minifloat`
      defines it.
    """
    format, stated = STATED[name]
    field = "mu" if format.signed else "nu"
    exact = _moving_average(field)
    stored = optax_rms.compress_state(exact, **{field: format})

    def step(i: jax.Array, carry: Any) -> Any:
        states, sums = carry
        key = jax.random.fold_in(jax.random.key(0), i)
        g = jax.random.normal(key, (ELEMENTS,))
        states = tuple(
            tx.update(g, state)[1]
            for tx, state in zip((exact, stored), states, strict=True)
        )
        v = getattr(states[0], field)
        w = format.decode(getattr(states[1].inner_state, field))
        error = jnp.square(w - v if format.signed else jnp.log(w / v) / 2)
        new = jnp.stack([w - v, jnp.square(v), error]).mean(axis=1)
        return states, sums + new

    @functools.partial(jax.jit, donate_argnums=1)
    def block(start: Any, states: Any) -> Any:
        carry = states, jnp.zeros(3)
        return jax.lax.fori_loop(start, start + steps // blocks, step, carry)

    g = jax.random.normal(jax.random.key(1), (ELEMENTS,))
    # The average of a block begins where its own past is forgotten.
    states = exact.init(g), stored.init(g)
    states, _ = block(0, states)
    rows = []
    for i in range(1, blocks + 1):
        states, sums = block(i * (steps // blocks), states)
        rows.append(np.asarray(sums, np.float64) / (steps // blocks))
    difference, square, error = np.array(rows).T
    size = np.sqrt(square.mean())
    bias = difference / size
    noise = np.sqrt(error.mean())
    if format.signed:
        noise /= size
    return {
        "format": name,
        "steps": steps,
        "bias": [float(x) for x in bias],
        "noise": float(noise),
        "stated_noise": stated,
    }


def _moving_average(field: str) -> optax.GradientTransformation:
    """The average of squares, ``nu``, or of gradients, ``mu``."""
    if field == "nu":
        return optax_rms.scale_by_rms(DECAY)

    def init(params: Any) -> Any:
        return optax.ScaleByLionState(jnp.zeros([], jnp.int32), jnp.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        mu = DECAY * state.mu + (1 - DECAY) * updates
        return mu, state._replace(mu=mu)

    return optax.GradientTransformation(init, update)


def residual_drift(steps: int, bits: int) -> dict[str, Any]:
    """Weights that are split, beside float32, for ``steps`` small steps.

    Every weight is pushed up and down by turns of 1,000 steps, by 1e-5 a step, which
    bfloat16 alone would lose.
    """
    tx = optax_rms.split_master_weights(optax.sgd(1.0), residual_bits=bits)
    start = jnp.linspace(0.5, 1.5, ELEMENTS)

    def step(i: jax.Array, carry: Any) -> Any:
        exact, params, state = carry
        g = jnp.where(i // 1000 % 2 == 0, 1e-5, -1e-5) * jnp.ones(ELEMENTS)
        updates, state = tx.update(g.astype(params.dtype), state, params)
        return (
            exact - g.astype(params.dtype),
            optax.apply_updates(params, updates),
            state,
        )

    params = start.astype(jnp.bfloat16)
    carry = params.astype(jnp.float32), params, tx.init(params)
    carry = jax.jit(lambda c: jax.lax.fori_loop(0, steps, step, c))(carry)
    exact, params, state = carry
    whole = optax_rms.master_weights(params, state)
    return {
        "residual_bits": bits,
        "steps": steps,
        "largest_difference": float(jnp.max(jnp.abs(whole - exact))),
    }


def counters() -> dict[str, Any]:
    """Steps across 2^31 and 2^32 of every counter; none stops or gives NaN."""
    inner = optax_rms.rmsprop(
        optax.linear_schedule(0.1, 0.2, 10), 0.9, momentum=0.9, bias_correction=True
    )
    tx = optax_rms.compress_state(inner, nu=UE6M2, trace=SE5M2)
    tx = optax_rms.split_master_weights(tx)
    params = jnp.ones(ELEMENTS, jnp.bfloat16)
    step = jax.jit(tx.update)
    crossings, finite, changing = [], True, True
    for power in (31, 32):
        state = _set_counters(tx.init(params), 2**power - 4)
        before = _counters(state)
        codes = []
        for _ in range(8):
            g = jnp.ones(ELEMENTS, jnp.bfloat16)
            updates, state = step(g, state, params)
            finite &= bool(jnp.isfinite(updates).all())
            codes.append(np.asarray(optax.tree.get(state, "nu")).tobytes())
        changing &= len(set(codes)) == len(codes)
        for name, (value, bits) in _counters(state).items():
            start, _ = before[name]
            wrapped = (start + 8) % 2**bits
            expected = wrapped if bits == 32 else min(start + 8, 2**31 - 1)
            crossings.append(
                {"counter": name, "from": start, "to": value, "expected": expected}
            )
    return {"crossings": crossings, "finite": finite, "rounding_differs": changing}


def _set_counters(state: Any, value: int) -> Any:
    def changed(x: Any) -> Any:
        if x.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            return x
        return jnp.asarray(min(value, int(jnp.iinfo(x.dtype).max) - 4), x.dtype)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    return treedef.unflatten(
        leaf if "formats" in jax.tree_util.keystr(path) else changed(leaf)
        for path, leaf in leaves
    )


def _counters(state: Any) -> dict[str, tuple[int, int]]:
    """The value of each counter, and the bits in which it wraps; int32 stops."""
    return {
        jax.tree_util.keystr(path): (int(x), 32 if x.dtype == jnp.uint32 else 31)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
        if not x.shape
        and jnp.issubdtype(x.dtype, jnp.integer)
        and "formats" not in jax.tree_util.keystr(path)
    }


def memory(steps: int) -> dict[str, Any]:
    """Live arrays, and growth of the process, over compiled steps from Python."""
    tx = _every_wrapper()
    params = {"w": jnp.ones((32, 32)), "b": jnp.ones(32)}
    state = tx.init(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    gradients = jax.tree.map(jnp.ones_like, params)

    def advance(n: int) -> tuple[int, int]:
        nonlocal state
        for _ in range(n):
            _, state = step(gradients, state, params)
        gc.collect()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return len(jax.live_arrays()), peak

    arrays, peak = advance(steps // 10)
    later_arrays, later_peak = advance(steps)
    return {
        "steps": steps,
        "live_arrays_growth": later_arrays - arrays,
        "peak_growth_kib": later_peak - peak,
    }


def threads(count: int, steps: int) -> dict[str, Any]:
    """Threads that step states of their own of one transformation, and one thread."""
    tx = _every_wrapper()
    step = jax.jit(tx.update)

    def train(seed: int, update: Any) -> bytes:
        params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
        state = tx.init(params)
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            g = jax.tree.map(
                lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
            )
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        leaves = jax.tree.leaves((params, state))
        return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)

    different = bits = 0
    for update in (step, tx.update):
        run = functools.partial(train, update=update)
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            together = list(pool.map(run, range(count)))
        alone = [run(seed) for seed in range(count)]
        different += sum(a != b for a, b in zip(together, alone, strict=True))
        bits += 8 * sum(map(len, alone))
    return {"threads": count, "steps": steps, "different": different} | {
        "bits_compared": bits
    }


def _every_wrapper() -> optax.GradientTransformationExtraArgs:
    inner = optax_rms.rmsprop(1e-2, centered=True, momentum=0.9)
    formats: dict[str, Minifloat] = {"mu": SE8M7, "variance": UE8M8, "trace": SE5M2}
    return optax_rms.compress_state(inner, **formats)


def measure(
    steps: int, python_steps: int, formats: Sequence[str], progress: Any
) -> Any:
    return {
        "drift": [drift(name, steps) for name in progress(formats)],
        "residuals": [residual_drift(steps, bits) for bits in (8, 16)],
        "counters": counters(),
        "memory": memory(python_steps),
        "threads": threads(8, 20),
    }
