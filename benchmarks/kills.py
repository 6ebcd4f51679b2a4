# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at random moments, and resumed: they must end the same."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks import small_run

UNFINISHED = "checkpoints/*.orbax-checkpoint-tmp*"


class Runs:
    """Processes that resume the small run in a folder.

    Attributes:
      num_epochs: of a whole run.
      num_processes: that train together.
    """

    def __init__(self, num_epochs: int, num_processes: int = 1):
        self.num_epochs, self.num_processes = num_epochs, num_processes
        # A server that has imported everything, and has no devices yet, forks them.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.small_run"])

    def start(self, folder: Path, file_size_limit: int | None = None) -> Any:
        arguments = folder, self.num_epochs, self.num_processes, file_size_limit
        process = self._context.Process(target=small_run.run, args=arguments)
        process.start()
        return process

    def finish(self, folder: Path) -> dict[str, Any]:
        """Resumes without a kill; the bits at the end."""
        process = self.start(folder)
        process.join()
        if process.exitcode:
            raise RuntimeError(small_run.messages_of(folder).read_text())
        return json.loads((folder / "end.json").read_text())


def measure_alone(kills: int, num_epochs: int, folder: Path, progress: Any) -> Any:
    """Kills of a lone process, every second one while a checkpoint is written."""
    runs, rng = Runs(num_epochs), random.Random(0)
    start = time.monotonic()
    reference = runs.finish(folder / "reference")
    duration = time.monotonic() - start
    counts = {"kills": 0, "while_writing": 0, "ends": 0, "different_ends": 0}
    counts["bits_compared"] = 0

    def compare() -> None:
        end = runs.finish(folder / f"killed_{counts['ends']}")
        counts["ends"] += 1
        counts["different_ends"] += end != reference
        counts["bits_compared"] += reference["bits"]

    # Some runs end before the moment of their kill.
    for _ in progress(iter(lambda: counts["kills"] < kills, False), total=kills):
        run = folder / f"killed_{counts['ends']}"
        process, left_over = runs.start(run), set(run.glob(UNFINISHED))
        if counts["kills"] % 2:
            process.join(rng.uniform(0, duration))
        else:
            while process.is_alive() and not set(run.glob(UNFINISHED)) - left_over:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            counts["kills"] += 1
            counts["while_writing"] += bool(set(run.glob(UNFINISHED)) - left_over)
        else:
            compare()
    compare()
    return counts


def measure_together(kills: int, num_epochs: int, folder: Path, progress: Any) -> Any:
    """Kills of one of two processes that train together, first and second in turn."""
    runs = Runs(num_epochs, num_processes=2)
    reference = runs.finish(folder / "reference_of_two")
    run = folder / "killed_of_two"
    counts: dict[str, Any] = {"kills": 0, "ended_with_message": 0}
    counts["longest_s_to_end"] = 0.0
    for i in progress(range(kills)):
        process, before = runs.start(run), set(run.glob("checkpoints/epoch_*"))
        while not set(run.glob("checkpoints/epoch_*")) - before:
            if not process.is_alive():
                raise RuntimeError(small_run.messages_of(run).read_text())
            time.sleep(0.001)
        victim = workers(process.pid)[i % 2]
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        process.join()
        seconds = time.monotonic() - start
        counts["longest_s_to_end"] = max(counts["longest_s_to_end"], round(seconds, 1))
        counts["kills"] += 1
        last = small_run.messages_of(run).read_text().splitlines()[-1]
        counts["ended_with_message"] += last.startswith("ended: a process ended")
    end = runs.finish(run)
    counts["different_ends"] = int(end != reference)
    counts["bits_compared"] = end["bits"]
    return counts


def workers(pid: int) -> list[int]:
    """The processes that `multiprocessing` spawned for a process, in this order."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
