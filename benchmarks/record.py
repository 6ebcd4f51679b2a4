# SPDX-License-Identifier: Apache-2.0
"""The origin of the numbers, in every result file: machine, versions, commit."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("optax-rms", "jax", "jaxlib", "optax", "numpy"),
    *("torch", "keras", "timm", "bitsandbytes"),
    *("jax-cuda12-plugin", "libtpu"),
)


def save(name: str, measured: Any, folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """Write ``measured`` with machine, versions, date, commit and command."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(origin() | {"measured": measured}, indent=2) + "\n")
    return path


def origin() -> dict[str, Any]:
    """The machine, versions, date, commit and command of this process."""
    script = pathlib.Path(sys.argv[0]).stem
    module = "benchmarks" if script == "__main__" else f"benchmarks.{script}"
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()} | versions(),
    }


def commit() -> str | None:
    """The checked-out commit, marked if any file differs, except results.

    ``None`` where there is only a copy of the files.
    """
    try:
        found = git("describe", "--always")
        results = RESULTS.relative_to(ROOT)
        changed = git("status", "--porcelain", "--", ".", f":(exclude){results}")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}-dirty" if changed else found


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def device_name() -> str:
    """The device's model in one word: ``cpu``, ``h100``."""
    words = re.findall(r"\w+", jax.devices()[0].device_kind.lower())
    return next((word for word in words if re.search(r"\d", word)), words[-1])


def versions() -> dict[str, str | None]:
    """The versions of the compared packages; ``None`` if a package is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
