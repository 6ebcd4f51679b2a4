# SPDX-License-Identifier: Apache-2.0
"""How times grow: of a step, with the number of parameters and with that of leaves,
and of tracing, lowering and compiling, with the number of leaves.

A thousand leaves of one shape are the best case for a library that traces a shape once;
a thousand of different shapes are the worst.
"""

from collections.abc import Callable
from typing import Any

from benchmarks import peers
from benchmarks.leaves import Shapes
from benchmarks.peers import SIDES, Leaves
from benchmarks.timing import alternate, summary
from benchmarks.update_step import COPY

ELEMENTS = [10**3, 10**4, 10**5, 10**6, 10**7, 10**8]
TOTAL = 10**7
LEAF_COUNTS = [1, 10, 100, 1000, 10_000]
QUICK_ELEMENTS = [10**4, 10**6]
QUICK_TOTAL = 10**6
QUICK_LEAF_COUNTS = [1, 5]

JAX_SIDES = [peers.OURS, peers.UE6M2, peers.OPTAX, peers.KERAS]
STEP_SIDES = [*JAX_SIDES, peers.FOREACH, peers.COMPILED]
# How many leaves a side compiles within a minute or so.
MOST_LEAVES = {
    peers.OURS: 1000,
    peers.UE6M2: 100,
    peers.OPTAX: 1000,
    peers.KERAS: 1000,
    peers.COMPILED: 100,
}
MOST_SHAPES = 100


def measure(quick: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    elements = QUICK_ELEMENTS if quick else ELEMENTS
    counts = QUICK_LEAF_COUNTS if quick else LEAF_COUNTS
    total = QUICK_TOTAL if quick else TOTAL
    points = [("elements", n, [(n,)]) for n in elements]
    points += [("leaves", n, equal_shapes(n, total)) for n in counts]
    points += [("stages, one shape", n, equal_shapes(n, total)) for n in counts]
    points += [
        ("stages, all shapes", n, distinct_shapes(n, total))
        for n in counts
        if n <= MOST_SHAPES
    ]
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind, _, _ in points}
    for kind, n, shapes in progress(points, unit="point"):
        if kind.startswith("stages"):
            found = stages(_compilable(JAX_SIDES, len(shapes)), shapes)
        else:
            sides = peers.choose(STEP_SIDES, quick)
            found = steps(_compilable(sides, len(shapes)), shapes)
        rows[kind] += [{"n": n} | row for row in found]
    return {"total": total, "rows": rows}


def equal_shapes(count: int, total: int) -> Shapes:
    return count * [(total // count,)]


def distinct_shapes(count: int, total: int) -> Shapes:
    return [(total // count - count // 2 + i,) for i in range(count)]


def steps(sides: list[str], shapes: Shapes) -> list[dict[str, Any]]:
    """Seconds per step, and of a copy that moves as many bytes as the first side."""
    leaves = Leaves(shapes)
    runs, reasons = peers.start(sides, leaves)
    copies = {COPY: peers.Copy(20 * leaves.elements)}
    seconds = alternate(copies | runs, peers.steps_per_round(), seconds=0.5)
    rows = [{"side": side, "seconds": seconds[side]} for side in runs]
    bandwidth = copies[COPY].moved_bytes / seconds[COPY]["median"]
    limit = {"median": 20 * leaves.elements / bandwidth}
    rows.append({"side": COPY, "seconds": limit})
    return rows + [{"side": s, "not_measured": why} for s, why in reasons.items()]


def stages(sides: list[str], shapes: Shapes) -> list[dict[str, Any]]:
    """Seconds to trace, lower and compile."""
    samples: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(3):
        for side in sides:
            samples[side].append(SIDES[side](Leaves(shapes)).compile_seconds)
    return [
        {
            "side": side,
            **{
                stage: summary([sample[stage] for sample in samples[side]])
                for stage in ("trace", "lower", "compile")
            },
        }
        for side in sides
    ]


def _compilable(sides: list[str], count: int) -> list[str]:
    return [side for side in sides if count <= MOST_LEAVES.get(side, count)]
