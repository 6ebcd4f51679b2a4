# SPDX-License-Identifier: Apache-2.0
"""Time of a step with `one_pass`, beside PyTorch's compiler.

Each side runs in a separate process, because XLA has the flag for a whole process, and
so that the threads of PyTorch do not slow down XLA. The processes take turns.
"""

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

import optax_rms
from benchmarks import peers
from benchmarks.leaves import LEAF_SETS, QUICK_LEAF_SETS, Shapes
from benchmarks.peers import LEARNING_RATE, Leaves, NotMeasured, Run
from benchmarks.timing import alternate

FLAG = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
OURS = "optax_rms.one_pass(optax_rms.rmsprop)"
ADAM = "optax_rms.one_pass(optax.adam)"
OPTAX_ADAM = "optax.adam"
COMPILED_ADAM = "torch.optim.Adam, torch.compile"
# All ratios are relative to the first side.
COMPARISONS = {
    "RMSProp": [peers.COMPILED, OURS, peers.OURS],
    "Adam": [COMPILED_ADAM, ADAM, OPTAX_ADAM],
}


def _adam() -> optax.GradientTransformation:
    return optax.adam(LEARNING_RATE)


def _torch_adam(leaves: Leaves) -> Run:
    params, torch = leaves.torch_params, peers.module("torch")
    optimizer = torch.optim.Adam(params, LEARNING_RATE)
    return peers.TorchRun(optimizer, params, is_compiled=True)


SIDES: dict[str, Callable[[Leaves], Run]] = {
    OURS: functools.partial(
        peers.jax_run,
        lambda: optax_rms.one_pass(optax_rms.rmsprop(LEARNING_RATE)),
    ),
    ADAM: functools.partial(peers.jax_run, lambda: optax_rms.one_pass(_adam())),
    OPTAX_ADAM: functools.partial(peers.jax_run, _adam),
    COMPILED_ADAM: _torch_adam,
    peers.OURS: peers.SIDES[peers.OURS],
    peers.COMPILED: peers.SIDES[peers.COMPILED],
}


def measure(quick: bool, progress: Callable[..., Any]) -> dict[str, Any]:
    if jax.default_backend() != "cpu":
        raise NotMeasured("one_pass changes programs for a CPU only")
    leaf_sets = QUICK_LEAF_SETS if quick else LEAF_SETS
    cells = [(leaves, name) for leaves in leaf_sets for name in COMPARISONS]
    rows = []
    for leaves, name in progress(cells, unit="comparison"):
        sides = [s for s in COMPARISONS[name] if not (quick and "torch.compile" in s)]
        for row in compare(leaf_sets[leaves], sides, 0.5 if quick else 20):
            rows.append({"leaves": leaves, "comparison": name} | row)
    return {"rows": rows}


def compare(shapes: Shapes, sides: list[str], seconds: float) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[int], None]] = {}
    with contextlib.ExitStack() as processes:
        for side in sides:
            if "torch.compile" in side and len(shapes) > peers.MOST_COMPILED_LEAVES:
                reason = "takes minutes to compile"
                rows[side] = {"side": side, "not_measured": reason}
                continue
            runs[side], moved = processes.enter_context(in_process(side, shapes))
            rows[side] = {"side": side, "moved_bytes": moved}
        for side, times in alternate(runs, seconds=seconds).items():
            rows[side]["seconds"] = times
    return list(rows.values())


@contextlib.contextmanager
def in_process(
    side: str, shapes: Shapes
) -> Iterator[tuple[Callable[[int], None], int]]:
    """A function that takes steps in a new process, and the bytes that they move."""
    here, there = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=serve, args=(there, side, shapes), daemon=True)
    flags = os.environ.get("XLA_FLAGS", "")
    if "one_pass" in side:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}"
    try:
        process.start()
    finally:
        os.environ["XLA_FLAGS"] = flags
    there.close()

    def run(steps: int) -> None:
        here.send(steps)
        here.recv()

    try:
        yield run, here.recv()
    finally:
        here.close()
        process.join()


def serve(connection: Any, side: str, shapes: Shapes) -> None:
    """Take as many steps as are asked for, until nobody asks."""
    run = SIDES[side](Leaves(shapes))
    connection.send(run.moved_bytes)
    with contextlib.suppress(EOFError):
        while True:
            run(connection.recv())
            connection.send(None)
