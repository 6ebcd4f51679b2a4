# SPDX-License-Identifier: Apache-2.0
"""Measures the optimizers of this library beside their peers, on this machine.

    python -m benchmarks                    # all parts; rewrites benchmarks/results
    python -m benchmarks --quick            # small sizes, to a temporary folder
    python -m benchmarks --only memory,growth

Then `python -m benchmarks.report` renders tables and pictures.
"""

import argparse
import functools
import importlib
import pathlib
import sys
import tempfile

from tqdm import tqdm

from benchmarks import record
from benchmarks.peers import NotMeasured

# Whether the results depend on the device, and have a file for each device.
PARTS = {
    "update_step": True,
    "one_pass": True,
    "eager": True,
    "calls": True,
    "growth": True,
    "stages": True,
    "memory": True,
    "quality": False,
    "first_moments": False,
    "fidelity": False,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", help="parts, with commas between them")
    parser.add_argument("--output", type=pathlib.Path, help="folder for the results")
    options = parser.parse_args(argv)
    parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    folder = options.output
    if folder is None and options.quick:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="benchmarks-"))
    failed = False
    for part in parts:
        try:
            measure = importlib.import_module(f"benchmarks.{part}").measure
        except ModuleNotFoundError as error:
            print(f"{part}: not measured, {error.name} is not installed")
            failed = True
            continue
        try:
            measured = measure(options.quick, functools.partial(tqdm, desc=part))
        except NotMeasured as reason:
            print(f"{part}: not measured, {reason}")
            continue
        name = f"{part}.{record.device_name()}" if PARTS[part] else part
        print(record.save(name, measured, folder or record.RESULTS))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
