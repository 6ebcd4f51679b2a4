# SPDX-License-Identifier: Apache-2.0
"""Result files that say where their numbers come from."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

PACKAGES = ("optax-rms", "jax", "jaxlib", "optax", "flax", "numpy", "scikit-learn")


def save(path: Path, command: str, measured: dict[str, Any]) -> None:
    """Writes what was measured, after the command, date, machine and versions."""
    record = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": {
            "device": jax.devices()[0].device_kind,
            "processor": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }
    path.write_text(json.dumps(record | measured, indent=2, allow_nan=False) + "\n")


def as_json(values: np.ndarray) -> list[Any]:
    """Nested lists with `None` for what is not finite, since JSON has no NaN."""
    listed = values.astype(object)
    listed[~np.isfinite(values)] = None
    return listed.tolist()
