# SPDX-License-Identifier: Apache-2.0
"""Storage formats for the optimizer of DreamerV3, whose epsilon is 1e-20.

    python -m benchmarks.dreamer

Gaussian gradients of nine scales, 2,000 weights each, for 3,000 steps of
`recipes.laprop(eps=1e-20)`, which is the optimizer of DreamerV3 without its clipping.
Each storage format gets the same gradients. Of the last 1,000 steps the table has the
mean length, divided by that of a run in float32, and the longest in learning rates; and
of the last state the share of codes that are 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_rms
from benchmarks import record
from optax_rms import recipes

SCALES = (1.0, 1e-2, 1e-4, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)
WEIGHTS = 2_000
STEPS = 3_000
LAST = 1_000

LOWER = dataclasses.replace(optax_rms.UE6M2, lowest_exponent=-70)
FORMATS: dict[str, dict[str, optax_rms.Minifloat]] = {
    "float32": {},
    "nu=UE8M8": {"nu": optax_rms.UE8M8},
    "nu=UE6M2": {"nu": optax_rms.UE6M2},
    "nu=UE6M2@-70": {"nu": LOWER},
    "nu=UE6M2@-70*0.999": {"nu": dataclasses.replace(LOWER, decay=0.999)},
    "nu=UE8M8, trace=SE8M7": {"nu": optax_rms.UE8M8, "trace": optax_rms.SE8M7},
    "nu=UE8M8, trace=SE5M2": {"nu": optax_rms.UE8M8, "trace": optax_rms.SE5M2},
}


def measure(formats: dict[str, optax_rms.Minifloat]) -> list[dict[str, Any]]:
    """Mean and longest step of the last steps, and zeros of `nu`, for every scale."""
    tx: Any = recipes.laprop(1.0, eps=1e-20)
    if formats:
        tx = optax_rms.compress_state(tx, **formats)
    params = {str(scale): jnp.zeros(WEIGHTS) for scale in SCALES}

    @jax.jit
    def run(state):
        def step(carry, key):
            state, total, longest = carry
            keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
            gradients = {
                k: float(k) * jax.random.normal(keys[k], (WEIGHTS,)) for k in keys
            }
            updates, state = tx.update(gradients, state, params)
            lengths = jax.tree.map(jnp.abs, updates)
            total = jax.tree.map(lambda t, x: t + x.mean(), total, lengths)
            longest = jax.tree.map(
                lambda a, x: jnp.maximum(a, x.max()), longest, lengths
            )
            return (state, total, longest), None

        def many(state, keys):
            nothing = dict.fromkeys(params, jnp.zeros(()))
            return jax.lax.scan(step, (state, nothing, nothing), keys)[0]

        keys = jax.random.split(jax.random.key(0), STEPS)
        state, *_ = many(state, keys[:-LAST])
        return many(state, keys[-LAST:])

    state, total, longest = run(tx.init(params))
    return [
        {
            "scale": float(k),
            "mean_step": float(total[k]) / LAST,
            "longest_step": float(longest[k]),
            "zeros": zeros_of(state, k) if "nu" in formats else 0.0,
        }
        for k in params
    ]


def zeros_of(state: Any, key: str) -> float:
    codes = optax.tree.get(state, "nu")[key]
    return float(np.mean(np.asarray(codes) == 0))


def main() -> None:
    rows = {name: measure(formats) for name, formats in FORMATS.items()}
    for name, cells in rows.items():
        for cell, plain in zip(cells, rows["float32"], strict=True):
            cell["relative_step"] = cell["mean_step"] / plain["mean_step"]
        steps = " ".join(f"{cell['relative_step']:8.3f}" for cell in cells)
        print(f"{name:25}{steps}")
    print(record.save("dreamer", rows))


if __name__ == "__main__":
    main()
