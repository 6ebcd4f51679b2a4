# SPDX-License-Identifier: Apache-2.0
"""Several processes on this machine that train together, as the hosts of a cluster."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait

import jax

from .command_line import InputError

_SECONDS_TO_END = 10  # for a process that waits for one that is gone


def run_together(work: Callable[[], None], num_processes: int) -> None:
    """Calls ``work`` in each of several processes, joined by `jax.distributed`.

    Args:
      work: called once `jax.distributed` is there. A function of a module, or a
        `functools.partial` of such a function, because it is pickled.
      num_processes: at least 1; a single one is this process, not joined to others.

    Raises:
      InputError: a process ended before its work was done. The others, which cannot go
        on without it, have ended as well.
    """
    if num_processes == 1:
        return work()
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        address = f"localhost:{unused.getsockname()[1]}"
    # A forked process has the locks of JAX's threads, but not these threads.
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_join, args=(work, address, num_processes, i))
        for i in range(num_processes)
    ]
    try:
        for process in processes:
            process.start()
        while not any(process.exitcode for process in processes):
            running = [p.sentinel for p in processes if p.exitcode is None]
            if not running:
                return
            wait(running)
        for process in processes:
            process.join(_SECONDS_TO_END)
        codes = ", ".join(str(process.exitcode) for process in processes)
        raise InputError(f"a process ended too early; the exit codes are {codes}")
    finally:
        for process in processes:
            process.kill()


def _join(
    work: Callable[[], None], address: str, num_processes: int, process_id: int
) -> None:
    jax.distributed.initialize(address, num_processes, process_id)
    try:
        work()
    except Exception as error:
        if isinstance(error, InputError | OSError):
            print(f"process {process_id}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        # An ordinary exit would wait for the other processes, which may be gone.
        os._exit(1)
