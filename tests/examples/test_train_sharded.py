# SPDX-License-Identifier: Apache-2.0
"""Weights and state in parts on devices: losses, bytes, and other arrangements."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
import train_sharded

from benchmarks import kills

# Whole programs run for them.
pytestmark = pytest.mark.slow

EPOCHS = 6
# The gradients are sums over the batch, in another order in each arrangement. 120 steps
# pass on differences of single roundings, which are 2^-24 of a loss near 3 nats.
TOLERANCE = 120 * 2**-23


def run(output: Path, *flags: str) -> dict:
    """Runs the program on the eight devices of this process; returns its results."""
    train_sharded.main([*flags, "--quick", "--output", str(output)])
    return json.loads((output / "results.json").read_text())


def losses(found: dict) -> np.ndarray:
    return np.array([[e["loss"], e["val_loss"]] for e in found["history"]])


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory):
    """A run with weights and state in parts; the bits of both, and the folder."""
    output = tmp_path_factory.mktemp("in_parts")
    return output, run(output, "--epochs", str(EPOCHS))


def test_losses_fall_and_results_and_picture_are_written(in_parts):
    output, found = in_parts
    assert losses(found).shape == (EPOCHS, 2)
    assert (losses(found)[-1] < losses(found)[0] - 1).all()
    assert {"command", "date", "machine", "versions"} < found.keys()
    picture = matplotlib.image.imread(output / "train_sharded.png")
    assert picture.shape[:2] == (600, 1650)
    assert picture.std() > 0.01


def test_a_device_holds_its_part(in_parts):
    _, found = in_parts
    whole, part = found["bytes"]["one device"], found["bytes"]["each device"]
    # All dimensions of 16 and 64 are divided by 8; the vocabulary, of 99, is not.
    assert part["weights"] * 8 == whole["weights"]
    # Two counters are whole on each device.
    assert (part["state"] - 8) * 8 == whole["state"] - 8


def test_a_killed_process_ends_the_other_and_the_run_resumes_on_another_mesh(
    in_parts, tmp_path
):
    """Two processes with whole weights; then one, with replicas of parts."""
    environment = os.environ | {"XLA_FLAGS": ""}
    flags = ["--devices", "2", "--processes", "2", "--zero", "--quick", "--epochs"]
    together = subprocess.Popen(
        [sys.executable, train_sharded.__file__, *flags, "99", "--output", tmp_path],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "checkpoints" / "epoch_1" / "hashes.json").exists():
        assert together.poll() is None, together.communicate()
        time.sleep(0.01)
    os.kill(kills.workers(together.pid)[1], signal.SIGKILL)
    _, messages = together.communicate(timeout=120)
    assert together.returncode == 2
    found = re.search(
        r"^train_sharded.py: error: a process ended too early; the exit codes are "
        r"(-?\d+), -9$",
        messages,
        re.MULTILINE,
    )
    assert found, messages
    # The other one has ended by itself.
    assert int(found[1]) not in (0, -9)

    resumed = run(tmp_path, "--resume", "--replicas", "2", "--epochs", str(EPOCHS))
    assert resumed["arrangement"] == {
        "devices": jax.device_count(),
        "replicas": 2,
        "processes": 1,
        "zero": False,
    }
    np.testing.assert_allclose(losses(resumed), losses(in_parts[1]), rtol=TOLERANCE)
