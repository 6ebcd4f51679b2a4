# SPDX-License-Identifier: Apache-2.0
"""What every result file says about where its numbers come from."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("optax-rms", "jax", "jaxlib", "optax", "torch", "keras", "timm", "numpy")


def save(name: str, measured: Any) -> pathlib.Path:
    """Write ``measured`` with machine, versions, date, commit and command."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    record = {
        "command": f"python -m {__package__}.{pathlib.Path(sys.argv[0]).stem}",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()} | versions(),
        "measured": measured,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def versions() -> dict[str, str | None]:
    """The versions of the packages that take part; ``None`` where not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
