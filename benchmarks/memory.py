# SPDX-License-Identifier: Apache-2.0
"""Memory of a step beside parameters and gradients, in bytes per parameter.

The size of the state, the temporary arrays and the bytes accessed come from the
compiled step. On a GPU the allocator also reports the peak. Each side has a separate
process for the peak, because JAX keeps one peak per process.
"""

from collections.abc import Callable
from typing import Any

import jax

from benchmarks import peers
from benchmarks.leaves import Shapes
from benchmarks.peers import SIDES, JaxRun, Leaves, NotMeasured
from benchmarks.processes import in_new_process

BFLOAT16 = (peers.OURS, peers.UE6M2, peers.SPLIT, peers.OPTAX)
CASES = [(side, "float32") for side in SIDES if side != peers.SPLIT]
CASES += [(side, "bfloat16") for side in BFLOAT16]


def measure(quick: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    shapes = [(1024, 1024)] if quick else [(4096, 4096)]
    rows = []
    # On a CPU, PyTorch reports only the size of the state, and compiling takes long.
    is_told = jax.default_backend() == "gpu"
    cases = [case for case in CASES if is_told or peers.COMPILED not in case]
    for side, dtype in progress(cases, unit="optimizer"):
        try:
            needs = needs_of_step(side, Leaves(shapes, dtype))
        except NotMeasured as reason:
            needs = {"not_measured": str(reason)}
        rows.append({"side": side, "dtype": dtype} | needs)
    return {"rows": rows}


def needs_of_step(side: str, leaves: Leaves) -> dict[str, float | None]:
    run = SIDES[side](leaves)
    needs = {
        "state": run.state_bytes,
        "limit": run.moved_bytes,
        "accessed": None,
        "temporary": None,
        "allocator_peak": None,
    }
    if isinstance(run, JaxRun):
        needs["accessed"] = run.compiled.cost_analysis()["bytes accessed"]
        needs["temporary"] = run.compiled.memory_analysis().temp_size_in_bytes
    if jax.default_backend() == "gpu":
        del run
        needs["allocator_peak"] = in_new_process(
            allocator_peak, side, leaves.shapes, leaves.dtype
        )
    per_parameter = leaves.elements
    return {k: v if v is None else v / per_parameter for k, v in needs.items()}


def allocator_peak(side: str, shapes: Shapes, dtype: str) -> int:
    """Peak of bytes in use in this process after two steps, everything included."""
    run = SIDES[side](Leaves(shapes, dtype))
    run(2)
    if isinstance(run, JaxRun):
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    import torch

    return torch.cuda.max_memory_allocated()
