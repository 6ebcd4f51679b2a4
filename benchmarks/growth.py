# SPDX-License-Identifier: Apache-2.0
"""Time of a step over the number of its parameters, and over the number of leaves."""

from collections.abc import Callable
from typing import Any

from benchmarks import peers
from benchmarks.leaves import Shapes, equal_shapes
from benchmarks.peers import Leaves
from benchmarks.timing import alternate
from benchmarks.update_step import COPY

ELEMENTS = [10**3, 10**4, 10**5, 10**6, 10**7, 10**8]
TOTAL = 10**7
LEAF_COUNTS = [1, 10, 100, 1000, 10_000]
QUICK_ELEMENTS = [10**4, 10**6]
QUICK_TOTAL = 10**6
QUICK_LEAF_COUNTS = [1, 5]

COMPARED = [
    *(peers.OURS, peers.UE6M2, peers.OPTAX, peers.KERAS),
    *(peers.FOREACH, peers.COMPILED),
]
# Points with more leaves would take most of the time of the measurement.
MOST_LEAVES = {
    peers.OURS: 1000,
    peers.UE6M2: 100,
    peers.OPTAX: 1000,
    peers.KERAS: 1000,
    peers.COMPILED: 100,
}


def measure(quick: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    elements = QUICK_ELEMENTS if quick else ELEMENTS
    counts = QUICK_LEAF_COUNTS if quick else LEAF_COUNTS
    total = QUICK_TOTAL if quick else TOTAL
    points = [("elements", n, [(n,)]) for n in elements]
    points += [("leaves", n, equal_shapes(n, total)) for n in counts]
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind, _, _ in points}
    for kind, n, shapes in progress(points, unit="point"):
        found = steps(_compilable(peers.choose(COMPARED, quick), len(shapes)), shapes)
        rows[kind] += [{"n": n} | row for row in found]
    return {"total": total, "rows": rows}


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


def _compilable(sides: list[str], count: int) -> list[str]:
    return [side for side in sides if count <= MOST_LEAVES.get(side, count)]
