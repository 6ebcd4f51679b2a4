# SPDX-License-Identifier: Apache-2.0
"""Time before the first step: trace and lower, then compile.

All sides compile the same float32 step for the same leaves, in a new random order and
a new process each round. A thousand leaves of one shape are the best case for this
library, which traces each distinct shape once; a hundred leaves of distinct shapes are
the worst case.
"""

import random
from collections.abc import Callable
from typing import Any

from benchmarks import peers
from benchmarks.leaves import LEAF_SETS, Shapes, distinct_shapes, equal_shapes
from benchmarks.peers import SIDES, Leaves
from benchmarks.processes import in_new_process
from benchmarks.timing import summary

TOTAL = 10**7
LEAF_COUNTS = [1, 10, 100, 1000]
MODELS = ["ResNet-50", "GPT-2 124M"]
ROUNDS = 7
QUICK_TOTAL = 10**6
QUICK_LEAF_COUNTS = [1, 5]
QUICK_ROUNDS = 3

COMPARED = [peers.OURS, peers.UE6M2, peers.OPTAX, peers.KERAS]
# Points with more leaves would take most of the time of the measurement.
MOST_LEAVES = {peers.UE6M2: 200}
MOST_SHAPES = 100

ONE_SHAPE = "one shape"
ALL_DIFFERENT = "all different"


def measure(quick: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    total = QUICK_TOTAL if quick else TOTAL
    counts = QUICK_LEAF_COUNTS if quick else LEAF_COUNTS
    points = [(ONE_SHAPE, equal_shapes(n, total)) for n in counts]
    points += [
        (ALL_DIFFERENT, distinct_shapes(n, total)) for n in counts if n <= MOST_SHAPES
    ]
    points += [] if quick else [(model, LEAF_SETS[model]) for model in MODELS]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return {
        "total": total,
        "rows": [
            {"shapes": name, "n": len(shapes)} | row
            for name, shapes in progress(points, unit="point")
            for row in compare(shapes, rounds)
        ],
    }


def compare(shapes: Shapes, rounds: int) -> list[dict[str, Any]]:
    """A row for each side, with a `summary` of the seconds for each stage."""
    count = len(shapes)
    sides = [side for side in COMPARED if count <= MOST_LEAVES.get(side, count)]
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    order, shuffle = list(sides), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        found = in_new_process(compile_in_turn, order, shapes)
        for side, seconds in zip(order, found, strict=True):
            samples[side].append(seconds)
    return [
        {
            "side": side,
            "trace_and_lower": summary([s["trace"] + s["lower"] for s in found]),
            "compile": summary([s["compile"] for s in found]),
        }
        for side, found in samples.items()
    ]


def compile_in_turn(sides: list[str], shapes: Shapes) -> list[dict[str, float]]:
    """The seconds of each stage, in a process that has compiled one leaf before."""
    for side in sides:
        SIDES[side](Leaves([(1,)]))
    leaves = Leaves(shapes)
    return [SIDES[side](leaves).compile_seconds for side in sides]
