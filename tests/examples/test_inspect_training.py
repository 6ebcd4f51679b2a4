# SPDX-License-Identifier: Apache-2.0
"""The two faults that reports find, and that the runs without them train."""

import contextlib
import io
import json

import inspect_training
import jax
import matplotlib.image
import pytest

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
    output = tmp_path_factory.mktemp("inspect")
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        # Flax promotes the weights in bfloat16.
        jax.numpy_dtype_promotion("standard"),
    ):
        inspect_training.main(["--steps", "300", "--output", str(output)])
    found = json.loads((output / "inspect_training.json").read_text())
    return output, found, printed.getvalue()


@pytest.mark.parametrize(
    ("figure", "before", "after", "text"),
    [
        (
            "ruled_by_eps",
            "mean over the batch",
            "sum over the batch",
            "epsilon rules 100 %",
        ),
        ("lost_to_rounding", "bfloat16", "split_master_weights", "rounding takes "),
    ],
)
def test_report_names_the_fault_and_the_remedy_trains(
    finished, figure, before, after, text
):
    _, found, printed = finished
    shares, losses = (
        [found["runs"][name][key] for name in (before, after)]
        for key in (figure, "val_loss")
    )
    assert shares[0][-1] > 0.75
    assert shares[1][-1] < 0.25
    assert losses[1][-1] < 0.75 * losses[0][-1]
    # A title, the titles of columns and a line per leaf.
    tables = {block.splitlines()[0]: block for block in printed.split("\n\n")}
    first_layer = {
        name: next(line for line in block.splitlines() if "Dense_0.kernel" in line)
        for name in (before, after)
        for title, block in tables.items()
        if f": {name}, step 289" in title
    }
    assert text in first_layer[before]
    assert text not in first_layer[after]


def test_runs_are_those_that_were_asked_for(finished):
    output, found, _ = finished
    assert (found["steps"], found["seed"]) == (300, 0)
    assert "--steps 300" in found["command"]
    for run in found["runs"].values():
        assert run["steps"] == list(range(1, 301, 12))
        assert {len(column) for column in run.values()} == {inspect_training.REPORTS}
    picture = matplotlib.image.imread(output / "inspect_training.png")
    assert picture.shape[:2] == (1200, 1650)
    # Both colors, and little else than white.
    red, green, blue = (picture[..., i] for i in range(3))
    assert (red - blue > 0.4).any()
    assert (blue - red > 0.4).any()
    assert (green < 0.5).mean() < 0.2
