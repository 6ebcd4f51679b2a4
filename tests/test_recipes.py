# SPDX-License-Identifier: Apache-2.0
"""The recipes against the plain formula, with the published numbers written out."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.running import run

from optax_rms import recipes

BOUND = 2e-5
STEPS = 60
TENSORFLOW = reference.DIALECTS["tensorflow"]
TORCH = reference.DIALECTS["torch"]
PLAIN = reference.DIALECTS["optax"]


def periods(rate, factor, *lengths):
    """A rate that is multiplied by the factor after each of the lengths."""
    return np.concatenate([np.full(n, rate * factor**i) for i, n in enumerate(lengths)])


def repeated(rate, factor, length):
    return periods(rate, factor, *[length] * (STEPS // length + 1))[:STEPS]


def linear(rate, steps=STEPS):
    return rate * (1 - np.arange(steps) / steps)


# Enough to forget the initial mean square of 1, beside which epsilon is nothing.
A2C_STEPS = 1500
# Every 2.4 epochs of 5 steps; during the first 25 steps it warms up.
WARMUP = np.where(
    np.arange(STEPS) < 25,
    0.256 * np.arange(STEPS) / 25,
    periods(0.256, 0.97, 12, 12, 12, 12, 12),
)

RECIPES = {
    "dqn": (
        recipes.dqn(),
        {"learning_rate": 2.5e-4, "decay": 0.95, "eps": 0.01, "centered": True},
        PLAIN,
    ),
    "impala": (
        recipes.impala(STEPS),
        {"learning_rate": linear(4.8e-4), "decay": 0.99, "eps": 0.1},
        TENSORFLOW,
    ),
    "a3c": (
        recipes.a3c(STEPS),
        {"learning_rate": linear(7e-4), "decay": 0.99, "eps": 0.1},
        PLAIN,
    ),
    "a2c": (
        recipes.a2c(A2C_STEPS),
        {"learning_rate": linear(7e-4, A2C_STEPS), "decay": 0.99, "eps": 1e-5},
        TENSORFLOW,
    ),
    "inception_v3": (
        recipes.inception_v3(1),
        {
            "learning_rate": periods(0.1, 0.16, 30, 30),
            "decay": 0.9,
            "eps": 1.0,
            "momentum": 0.9,
        },
        TENSORFLOW,
    ),
    "efficientnet": (
        recipes.efficientnet(5),
        {"learning_rate": WARMUP, "decay": 0.9, "eps": 1e-3, "momentum": 0.9},
        TENSORFLOW,
    ),
    "mnasnet": (
        recipes.mnasnet(5, batch_size=256),
        {"learning_rate": WARMUP / 16, "decay": 0.9, "eps": 1e-3, "momentum": 0.9},
        TENSORFLOW,
    ),
    "mobilenet_v3": (
        recipes.mobilenet_v3(7),
        {
            "learning_rate": repeated(0.064, 0.973, 14),
            "decay": 0.9,
            "eps": 0.0316,
            "momentum": 0.9,
            "weight_decay": 1e-5,
        },
        TORCH,
    ),
    "graves_handwriting": (
        recipes.graves_handwriting(),
        {
            "learning_rate": 1e-4,
            "decay": 0.95,
            "eps": 1e-4,
            "centered": True,
            "momentum": 0.9,
        },
        PLAIN,
    ),
    "char_rnn": (
        recipes.char_rnn(4),
        {
            "learning_rate": periods(2e-3, 0.97, 40, 4, 4, 4, 4, 4),
            "decay": 0.95,
            "eps": 1e-8,
        },
        TORCH,
    ),
}


def gradients_for(name):
    """Gradients around the epsilon of a recipe, clipped as the recipe clips."""
    settings = RECIPES[name][1]
    root = settings["eps"] if RECIPES[name][2] is TORCH else settings["eps"] ** 0.5
    steps = A2C_STEPS if name == "a2c" else STEPS
    g = reference.gradient_stream(steps, root**2, seed=3)
    if name == "a2c":
        norms = np.linalg.norm(g.astype(np.float64), axis=1, keepdims=True)
        return g, g * np.minimum(1, 0.5 / norms)
    return g, np.clip(g, -5, 5) if name == "char_rnn" else g


def expected(name, **changes):
    _, settings, dialect = RECIPES[name]
    _, clipped = gradients_for(name)
    start = 1.0 if "weight_decay" in settings else 0.0
    trajectory = reference.rmsprop(
        clipped, params=start, **{**dialect, **settings, **changes}
    )
    return start, trajectory - start


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_are_the_published_ones(name):
    gradients, _ = gradients_for(name)
    start, trajectory = expected(name)
    params = jnp.full(gradients.shape[1:], start)
    actual = np.float64(run(RECIPES[name][0], gradients, params, how="scan").params)
    assert reference.relative_error(actual - start, trajectory) <= BOUND


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_matters(name):
    _, settings, dialect = RECIPES[name]
    _, trajectory = expected(name)
    changes = [{key: not value} for key, value in dialect.items()]
    changes += [
        {key: 0.99 * value} for key, value in settings.items() if key != "centered"
    ]
    is_scheduled = np.ndim(settings["learning_rate"]) > 0
    if is_scheduled:
        changes.append({"learning_rate": np.roll(settings["learning_rate"], 1)})
    for change in changes:
        if "lr_in_momentum" in change and not (is_scheduled and "momentum" in settings):
            continue
        _, other = expected(name, **change)
        assert reference.relative_error(other, trajectory) > 2 * BOUND, change


def test_every_recipe_is_tested():
    public = {
        name
        for name, value in vars(recipes).items()
        if callable(value) and value.__module__ == recipes.__name__ and name[0] != "_"
    }
    assert public - {"ArrayLike"} == RECIPES.keys()


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.impala,
        recipes.a3c,
        recipes.a2c,
        recipes.inception_v3,
        recipes.efficientnet,
        recipes.mnasnet,
        recipes.mobilenet_v3,
        recipes.char_rnn,
    ],
)
def test_a_schedule_needs_steps(recipe):
    with pytest.raises(ValueError, match=r"steps.* must be"):
        recipe(0)
    with pytest.raises(ValueError, match=r"steps.* must be"):
        recipe(2**31)
    with pytest.raises(TypeError, match=r"steps.* must be an int.*static_args"):
        recipe(4.8e-4)
    with pytest.raises(ValueError, match="learning_rate must be"):
        recipe(1000, learning_rate=-1.0)
