# SPDX-License-Identifier: Apache-2.0
"""Time of an eager step, without a compiler, for a small network.

Loops without `jax.jit` take such steps, for example in a first experiment. The sides
take turns in one process.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

import optax_rms
from benchmarks.leaves import Shapes
from benchmarks.peers import LEARNING_RATE, Leaves, NotMeasured, torch_run
from benchmarks.timing import alternate

# LeCun, Bottou, Bengio and Haffner, 1998, "Gradient-Based Learning Applied to Document
# Recognition", section III.C.4: the network 784-300-100-10.
NETWORK = "LeNet-300-100"
SHAPES: Shapes = [(784, 300), (300,), (300, 100), (100,), (100, 10), (10,)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered, momentum": {"centered": True, "momentum": 0.9},
}


class EagerRun:
    """Steps of a transformation without `jax.jit`, each operation by itself."""

    def __init__(self, tx: optax.GradientTransformation, leaves: Leaves):
        self._tx, self._gradients = tx, leaves.jax_gradients
        params = leaves.jax_params()
        self.params, self._state = params, tx.init(params)

    def __call__(self, steps: int) -> None:
        params, state = self.params, self._state
        for _ in range(steps):
            updates, state = self._tx.update(self._gradients, state, params)
            params = optax.apply_updates(params, updates)
        self.params, self._state = jax.block_until_ready((params, state))


def measure(quick: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    rows = []
    for name, options in progress(OPTIONS.items(), unit="comparison"):
        leaves = Leaves(SHAPES)
        runs: dict[str, Callable[[int], None]] = {
            f"{library.__name__}.rmsprop": EagerRun(
                library.rmsprop(LEARNING_RATE, **options), leaves
            )
            for library in (optax_rms, optax)
        }
        row = {"leaves": NETWORK, "comparison": name}
        try:
            runs["torch.optim.RMSprop"] = torch_run(leaves, **options)
        except NotMeasured as reason:
            missing = {"side": "torch.optim.RMSprop", "not_measured": str(reason)}
            rows.append(row | missing)
        times = alternate(runs, rounds=50, seconds=0.5 if quick else 10)
        rows += [row | {"side": s, "seconds": times[s]} for s in runs]
    return {"rows": rows}
