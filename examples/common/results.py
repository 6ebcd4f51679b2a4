# SPDX-License-Identifier: Apache-2.0
"""Result files that say where their numbers come from."""

import datetime
import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = (
    "optax-rms",
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "scikit-learn",
)


def save(path: Path, command: str, measured: dict[str, Any]) -> None:
    """Writes the measured values, after the command, date, machine and versions."""
    record = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
    }
    write_json(record | measured, path)


def machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "processor": platform.machine(),
        "cores": os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that can change a result."""
    return {"python": platform.python_version()} | {
        package: version(package) for package in PACKAGES
    }


def sha256(tree: Any) -> str:
    """A fingerprint of all leaves, bit for bit."""
    fingerprint = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        fingerprint.update(np.asarray(leaf).tobytes())
    return fingerprint.hexdigest()


def as_json(values: Any) -> Any:
    """Nested lists with `None` for each number that is not finite: JSON has no NaN."""
    values = np.asarray(values)
    listed = values.astype(object)
    listed[~np.isfinite(values)] = None
    return listed.tolist()


def write_json(content: Any, path: Path) -> None:
    """Writes a file that is never seen half-written."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(unfinished, path)
