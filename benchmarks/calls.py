# SPDX-License-Identifier: Apache-2.0
"""Time of a step with many leaves that is no arithmetic: the call from Python.

A call without arithmetic, a call of one step, and a call of ten steps in a loop take
the same parameters, state and gradients. All times are for one step.
"""

from collections.abc import Callable
from typing import Any

import jax

import optax_rms
from benchmarks import peers
from benchmarks.leaves import Shapes, equal_shapes
from benchmarks.peers import LEARNING_RATE, Copy, JaxRun, Leaves
from benchmarks.timing import alternate
from benchmarks.update_step import COPY

STEPS = 10
TOTAL = 8192 * 1000
QUICK_TOTAL = 10**4
LEAF_COUNTS = [1, 100, 1000]
QUICK_LEAF_COUNTS = [1, 10]


def measure(quick: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    total = QUICK_TOTAL if quick else TOTAL
    counts = QUICK_LEAF_COUNTS if quick else LEAF_COUNTS
    rows = []
    for count in progress(counts, unit="point"):
        labels = {"leaves": f"{count:,}", "comparison": "optax_rms.rmsprop"}
        for row in compare(equal_shapes(count, total), 0.1 if quick else 20):
            rows.append(labels | row)
    return {"total": total, "steps": STEPS, "rows": rows}


def compare(shapes: Shapes, seconds: float) -> list[dict[str, Any]]:
    leaves = Leaves(shapes)
    tx = optax_rms.rmsprop(LEARNING_RATE)
    step = peers.jax_step(tx)

    def nothing(params, state, gradients):
        del gradients
        return params, state

    def loop(params, state, gradients):
        def body(_, carry):
            return step(*carry, gradients)

        return jax.lax.fori_loop(0, STEPS, body, (params, state))

    def run(function: Callable) -> JaxRun:
        params = leaves.jax_params()
        return JaxRun(function, params, tx.init(params), leaves.jax_gradients)

    in_loop, one = run(loop), run(step)
    copy = Copy(one.moved_bytes)
    sides: dict[str, Callable[[int], Any]] = {
        COPY: copy,
        "no arithmetic": run(nothing),
        "one step": one,
        f"{STEPS} steps in a loop": lambda steps: in_loop(steps // STEPS),
    }
    times = alternate(sides, steps=STEPS, seconds=seconds)
    return [
        {"side": side, "seconds": times[side]}
        | {"moved_bytes": (copy if side == COPY else one).moved_bytes}
        for side in sides
    ]
