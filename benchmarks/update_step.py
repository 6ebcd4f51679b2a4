# SPDX-License-Identifier: Apache-2.0
"""Time of one step: update and apply, compiled together, in place.

The sides of a comparison take turns in one process. A copy takes turns with them and
measures the bandwidth of the memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import peers
from benchmarks.leaves import LEAF_SETS, QUICK_LEAF_SETS, Shapes
from benchmarks.timing import alternate

COPY = "copy"


class Comparison(NamedTuple):
    """Sides to compare; all ratios are relative to the first side."""

    sides: list[str]
    dtype: str = "float32"


# As many sides as 6 GB hold at a time with the leaves of GPT-2.
COMPARISONS = {
    "JAX": Comparison([peers.OURS, peers.OPTAX, peers.FACTORED, peers.KERAS]),
    "PyTorch": Comparison(
        [
            peers.OURS,
            peers.EAGER,
            peers.FOREACH,
            peers.COMPILED,
            peers.TIMM,
            peers.BITSANDBYTES,
            peers.BITSANDBYTES_8BIT,
        ]
    ),
    "momentum": Comparison([peers.OURS + peers.MOMENTUM, peers.OPTAX + peers.MOMENTUM]),
    "centered, momentum": Comparison(
        [peers.OURS + peers.CENTERED, peers.OPTAX + peers.CENTERED]
    ),
    "storage formats": Comparison(
        [peers.OURS, peers.UE6M2, peers.UE8M8, peers.OPTAX, peers.BITSANDBYTES_8BIT]
    ),
    "bfloat16": Comparison(
        [peers.OURS, peers.UE6M2, peers.SPLIT, peers.OPTAX, peers.FOREACH], "bfloat16"
    ),
}


def measure(quick: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    leaf_sets = QUICK_LEAF_SETS if quick else LEAF_SETS
    cells = [(leaves, name) for leaves in leaf_sets for name in COMPARISONS]
    rows = []
    for leaves, name in progress(cells, unit="comparison"):
        sides, dtype = COMPARISONS[name]
        comparison = Comparison(peers.choose(sides, quick), dtype)
        for row in compare(leaf_sets[leaves], comparison, 0.5 if quick else 10):
            rows.append({"leaves": leaves, "comparison": name} | row)
    return {"rows": rows}


def compare(
    shapes: Shapes, comparison: Comparison, seconds: float
) -> list[dict[str, Any]]:
    leaves = peers.Leaves(shapes, comparison.dtype)
    runs, reasons = peers.start(comparison.sides, leaves)
    first = runs[comparison.sides[0]]
    copy = peers.Copy(first.moved_bytes)
    times = alternate({COPY: copy, **runs}, peers.steps_per_round(), seconds=seconds)
    rows: list[dict[str, Any]] = [
        {"side": COPY, "moved_bytes": copy.moved_bytes, "seconds": times[COPY]}
    ]
    for side in comparison.sides:
        if side in reasons:
            rows.append({"side": side, "not_measured": reasons[side]})
            continue
        rows.append(
            {
                "side": side,
                "moved_bytes": runs[side].moved_bytes,
                "seconds": times[side],
            }
        )
    return rows
