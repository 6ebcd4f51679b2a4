# SPDX-License-Identifier: Apache-2.0
"""Kills, damaged files, extreme gradients and a million steps, and their results.

    python -m benchmarks.reliability               # all of it: an hour of CPU time
    python -m benchmarks.reliability --only soak   # keeps the other results
    python -m benchmarks.reliability --kills 2 --cases 100 --output /tmp/short

Then `python -m benchmarks.report` renders the tables of docs/reliability.md.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from tqdm import tqdm

from benchmarks import damage, extreme_gradients, kills, record, soak


def measure_kills(options: argparse.Namespace, folder: pathlib.Path) -> Any:
    return {
        "alone": kills.measure_alone(options.kills, 10, folder, tqdm),
        "together": kills.measure_together(options.pairs, 10, folder, tqdm),
    }


def measure_files(options: argparse.Namespace, folder: pathlib.Path) -> Any:
    return {
        "damaged": damage.measure_damage(options.damages, folder, tqdm),
        "others": damage.measure_others(folder),
        "no_space": damage.measure_no_space(folder, 4),
    }


def measure_gradients(options: argparse.Namespace, folder: pathlib.Path) -> Any:
    del folder
    wide = options.cases // 4
    found = [extreme_gradients.measure(options.cases - wide, dtypes=NARROW)]
    jax.config.update("jax_enable_x64", True)
    found.append(extreme_gradients.measure(wide, dtypes=["float64"]))
    jax.config.update("jax_enable_x64", False)
    return {key: sum(counts[key] for counts in found) for key in found[0]}


def measure_soak(options: argparse.Namespace, folder: pathlib.Path) -> Any:
    del folder
    progress = functools.partial(tqdm, desc="soak")
    return soak.measure(options.steps, options.steps // 50, list(soak.STATED), progress)


NARROW = [dtype for dtype in extreme_gradients.DTYPES if dtype != "float64"]
PARTS = {
    "kills": measure_kills,
    "files": measure_files,
    "gradients": measure_gradients,
    "soak": measure_soak,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", help=f"parts, with commas between them: {', '.join(PARTS)}")
    add("--kills", type=int, default=50, help="of a lone process")
    add("--pairs", type=int, default=10, help="kills of one of two processes")
    add("--damages", type=int, default=300, help="of one file of a checkpoint each")
    add("--cases", type=int, default=10_000, help="of extreme gradients")
    add("--steps", type=int, default=1_000_000, help="of each storage format")
    add("--output", type=pathlib.Path, default=record.RESULTS, help="folder")
    options = parser.parse_args(argv)
    parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](options, pathlib.Path(folder))
        # The parts take long, so that each is saved, beside those of earlier commands.
        saved = options.output / "reliability.json"
        measured = json.loads(saved.read_text())["measured"] if saved.exists() else {}
        measured[part] = record.origin() | found
        print(record.save("reliability", measured, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
