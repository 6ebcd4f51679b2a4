# SPDX-License-Identifier: Apache-2.0
"""The run that moves from PyTorch to JAX: it goes on as if it had stayed."""

import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from helpers import frameworks

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_without_torch(*arguments):
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, '.'); "
        f"sys.argv[1:] = {list(arguments)}; "
        "runpy.run_path('continue_from_torch.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES, capture_output=True, text=True
    )


def test_without_torch_it_says_how_to_install_it(tmp_path):
    done = run_without_torch("--output", str(tmp_path))
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "needs PyTorch" in line
    assert "https://pytorch.org/get-started" in line


def test_help_needs_no_torch():
    done = run_without_torch("--help")
    assert done.returncode == 0
    assert "--epochs" in done.stdout


@pytest.mark.parity
def test_the_continued_run_follows_the_other(monkeypatch, tmp_path, capsys):
    frameworks.require("torch")
    import continue_from_torch

    drawn = {}
    draw = continue_from_torch.draw_losses
    monkeypatch.setattr(
        continue_from_torch,
        "draw_losses",
        lambda runs, *args: drawn.update(runs) or draw(runs, *args),
    )
    # Optax's cosine schedule divides integers by floats, which "strict" forbids.
    with jax.numpy_dtype_promotion("standard"):
        continue_from_torch.main(["--epochs", "2", "--output", str(tmp_path / "run")])

    stayed, continued, restarted = drawn.values()
    half = len(stayed) // 2
    # Rounding apart, which a network passes on and enlarges from step to step.
    np.testing.assert_allclose(continued, stayed, rtol=1e-3)
    assert np.isnan(restarted[:half]).all()
    assert np.max(np.abs(restarted[half:] / stayed[half:] - 1)) > 1

    picture = matplotlib.image.imread(tmp_path / "run" / "losses.png")
    assert picture.shape == (600, 1500, 4)
    *lines, last = capsys.readouterr().out.splitlines()
    torch_line, jax_line = (line.split("validation")[1] for line in lines)
    assert torch_line == jax_line
    assert last == f"losses.png is in {tmp_path / 'run'}"


@pytest.mark.parity
@pytest.mark.parametrize("option", ["--epochs=1", "--epochs=x", "--seed=-1"])
def test_wrong_options_are_refused_in_one_line(option, capsys):
    frameworks.require("torch")
    import continue_from_torch

    with pytest.raises(SystemExit):
        continue_from_torch.main([option])
    (line,) = capsys.readouterr().err.splitlines()
    assert option.split("=")[0] in line
