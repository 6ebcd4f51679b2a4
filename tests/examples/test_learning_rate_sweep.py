# SPDX-License-Identifier: Apache-2.0
"""The sweep: its runs are the runs that each learning rate has by itself."""

import contextlib
import io
import json

import jax
import learning_rate_sweep
import matplotlib.image
import numpy as np
import pytest
from common import digits, sweep

import optax_rms

# A whole program runs for them.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def unoptimized():
    """Compiling takes most of the time, and these programs are small."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder, the results and what was printed."""
    output = tmp_path_factory.mktemp("sweep")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        learning_rate_sweep.main(["--quick", "--epochs", "1", "--output", str(output)])
    found = json.loads((output / "learning_rate_sweep.json").read_text())
    return output, found, printed.getvalue()


def test_grid_is_that_of_the_results(finished):
    _, found, _ = finished
    loss = np.array(found["val_loss"], dtype=float)
    assert loss.shape == (len(found["decays"]), len(found["learning_rates"])) == (4, 8)
    assert found["times"]["num_runs"] == 4 * 8 * len(found["seeds"])
    assert {"command", "date", "machine", "versions"} < found.keys()


def test_losses_lie_where_their_decay_and_learning_rate_say(finished):
    """One cell of the grid, trained alone: the mean over its seeds."""
    _, found, _ = finished
    training, validation, _ = sweep.load()
    row, column = 1, 4
    optimizer = optax_rms.rmsprop(
        found["learning_rates"][column], decay=found["decays"][row]
    )
    losses = []
    for seed in found["seeds"]:
        init_key, shuffle_key = jax.random.split(jax.random.key(seed))
        state = digits.create_state(optimizer, init_key, training.images.shape[1])
        _, metrics = digits.train_epoch(
            state, shuffle_key, training, validation, batch_size=found["batch_size"]
        )
        losses.append(metrics["val_loss"])
    # The order of summation differs, and 35 steps of training pass it on.
    assert found["val_loss"][row][column] == pytest.approx(np.mean(losses), rel=1e-3)
    loss = np.array(found["val_loss"], dtype=float)
    others = np.abs(loss / np.mean(losses) - 1) > 1e-2
    assert others.sum() == loss.size - 1


def test_factors_follow_from_the_times(capsys):
    learning_rate_sweep.print_times(
        {
            "num_runs": 100,
            "num_in_turn": 10,
            "compile_all": 4.0,
            "compile_one": 2.0,
            "train_all": 16.0,
            "train_in_turn": 4.0,
        }
    )
    printed = capsys.readouterr().out
    assert "one after another      2.0 s      40.0 s  extrapolated from 10" in printed
    assert "All at once is 2.5 times as fast" in printed
    assert "then it is 12 times" in printed


def test_times_are_measured(finished):
    _, found, printed = finished
    times = found["times"]
    assert all(value > 0 for value in times.values())
    assert f"{times['num_runs']} networks" in " ".join(printed.split())


def test_heat_map(finished):
    output, _, _ = finished
    assert matplotlib.image.imread(output / "learning_rate_sweep.png").shape == (
        432,
        1320,
        4,
    )


def test_diverged_runs_are_grey_in_the_heat_map(tmp_path):
    loss = np.full((4, 8), 0.5)
    loss[:, 4:] = [np.nan, np.inf, 1e9, np.nan]
    learning_rate_sweep.draw(np.logspace(-4, 0, 8), loss, tmp_path / "map.png")
    picture = matplotlib.image.imread(tmp_path / "map.png")[..., :3]
    grey = np.all(np.abs(picture - 0.88) < 0.01, axis=-1).any(axis=0).nonzero()[0]
    assert len(grey) > picture.shape[1] / 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--epochs", "1.5"], "--epochs: must be a whole number of at least 1"),
        (["--output", __file__], "File exists"),
    ],
)
def test_bad_values_are_refused_in_one_line(capsys, argv, expected):
    with pytest.raises(SystemExit) as exit_info:
        learning_rate_sweep.main(argv)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("learning_rate_sweep.py: error: ")
    assert expected in line


def test_interrupt_leaves_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning_rate_sweep, "run", interrupt)
    with pytest.raises(SystemExit) as exit_info:
        learning_rate_sweep.main(["--output", str(tmp_path)])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
