# SPDX-License-Identifier: Apache-2.0
"""The picture of the relatives: every path arrives, every average is what it says."""

import draw_relations
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from common import surfaces

import optax_rms


@pytest.fixture(autouse=True, scope="module")
def settings():
    """Optax's bias correction multiplies a step count with a float."""
    # Compiling takes most of the time, and these programs are small.
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_picture(tmp_path, capsys):
    draw_relations.main(["--output", str(tmp_path)])
    picture = matplotlib.image.imread(tmp_path / "relations.png")
    assert picture.shape == (616, 1430, 4)
    assert capsys.readouterr().out == f"relations.png is in {tmp_path}\n"


@pytest.mark.parametrize("cell", draw_relations.CELLS, ids=lambda cell: cell.name)
def test_path_settles_in_the_circle(cell):
    path = draw_relations.best_path(cell.make)
    assert 1 < len(path) <= draw_relations.NUM_STEPS
    radii = np.linalg.norm(path, axis=1)
    assert radii[-1] < surfaces.RAVINE.radius <= radii[-2]


@pytest.mark.parametrize(
    ("column", "schedule"),
    [(0, lambda count: 0.0), (1, lambda count: 0.85), (2, lambda count: 1 - 1 / count)],
    ids=["decay 0", "decay 0.85", "decay 1 - 1/t"],
)
def test_bars_are_the_weights_that_the_decay_gives(column, schedule):
    """The mean square after gradients that are 0 but for one, in each place."""
    steps = len(draw_relations.AGES)
    rms = optax.inject_hyperparams(optax_rms.scale_by_rms)(
        decay=lambda count: jnp.asarray(schedule(count + 1.0))
    )

    def mean_square(gradients):
        state = rms.init(gradients[0])
        for gradient in gradients:
            state = rms.update(gradient, state)[1]
        return optax.tree.get(state, "nu")

    latest_first = jax.vmap(mean_square)(jnp.eye(steps)[::-1])
    weights = np.float32(draw_relations.DENOMINATORS[column].weights)
    np.testing.assert_allclose(latest_first / latest_first[0], weights, rtol=1e-4)
