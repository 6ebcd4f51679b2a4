# SPDX-License-Identifier: Apache-2.0
"""The recipes against the plain formula, with the published numbers written out."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import reference
from helpers.on_request import all_by_default_but
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


@dataclasses.dataclass(frozen=True, eq=False)
class Published:
    """A recipe, and the numbers of its source once more.

    Attributes:
      recipe: the transformation.
      settings: the arguments of `reference.rmsprop` besides those of the dialect.
      dialect: its placement of epsilon, of the start and of the learning rate.
      norm: the bound on the norm of all gradients together.
      value: the bound on every element of the gradients.
      weights: the bound on the weights.
      steps: enough to forget an initial mean square of 1, beside which epsilon is
        nothing.
    """

    recipe: optax.GradientTransformation
    settings: Mapping[str, Any]
    dialect: Mapping[str, Any]
    norm: float = np.inf
    value: float = np.inf
    weights: float = np.inf
    steps: int = STEPS

    @property
    def start(self):
        """Weights that decay, or that soon reach their bound."""
        if np.isfinite(self.weights):
            return 0.999 * self.weights
        return 1.0 if "weight_decay" in self.settings else 0.0

    def gradients(self):
        """Gradients around the epsilon of the recipe, float32."""
        root = self.settings["eps"] ** (0.5 if self.dialect["eps_in_sqrt"] else 1.0)
        return reference.gradient_stream(self.steps, root**2, seed=3)

    def trajectory(self, **changes):
        """The parameters less their start after every step, in float64."""
        bounds = {"norm": self.norm, "value": self.value, "weights": self.weights}
        for name in bounds.keys() & changes.keys():
            bounds[name] = changes.pop(name)
        g = np.clip(np.float64(self.gradients()), -bounds["value"], bounds["value"])
        norms = np.linalg.norm(g, axis=1, keepdims=True)
        start = self.start
        path = reference.rmsprop(
            g * np.minimum(1, bounds["norm"] / norms),
            params=start,
            **{**self.dialect, **self.settings, **changes},
        )
        if np.isfinite(bounds["weights"]):
            weights = np.full(path.shape[1:], start)
            for t, step in enumerate(np.diff(path, axis=0, prepend=weights[None])):
                weights = np.clip(weights + step, -bounds["weights"], bounds["weights"])
                path[t] = weights
        return path - start

    def changes(self):
        """Every number and flag of the source, each of them changed a little."""
        yield from ({key: not value} for key, value in self.dialect.items())
        for key, value in self.settings.items():
            yield {key: not value if isinstance(value, bool) else 0.99 * value}
        for key in ("norm", "value", "weights"):
            if np.isfinite(getattr(self, key)):
                yield {key: 0.99 * getattr(self, key)}
        if np.ndim(self.settings["learning_rate"]):
            yield {"learning_rate": np.roll(self.settings["learning_rate"], 1)}


A2C_STEPS = 1500
# Every 2.4 epochs of 5 steps; during the first 25 steps it warms up.
WARMUP = np.where(
    np.arange(STEPS) < 25,
    0.256 * np.arange(STEPS) / 25,
    periods(0.256, 0.97, 12, 12, 12, 12, 12),
)
DQN = {"learning_rate": 2.5e-4, "decay": 0.95, "centered": True}
SEGMENTS = {"decay": 0.9, "eps": 1e-3, "momentum": 0.9}
GAN = {"eps": 1e-8, "bias_correction": True}

PUBLISHED = {
    "dqn": Published(recipes.dqn(), {**DQN, "eps": 0.01}, PLAIN),
    "dqn_zoo": Published(recipes.dqn_zoo(), {**DQN, "eps": 0.01 / 32**2}, PLAIN),
    "dqn_dopamine": Published(
        recipes.dqn_dopamine(), {**DQN, "eps": 1e-5}, TENSORFLOW, steps=300
    ),
    "dqn_minatar": Published(recipes.dqn_minatar(), {**DQN, "eps": 0.01}, TORCH),
    "impala": Published(
        recipes.impala(STEPS),
        {"learning_rate": linear(4.8e-4), "decay": 0.99, "eps": 0.1},
        TENSORFLOW,
    ),
    "impala_torchbeast": Published(
        recipes.impala_torchbeast(STEPS),
        {"learning_rate": linear(4.8e-4), "decay": 0.99, "eps": 0.01},
        TORCH,
        norm=40.0,
    ),
    "impala_cleanba": Published(
        recipes.impala_cleanba(STEPS),
        {"learning_rate": np.repeat(linear(6e-4, 15), 4), "decay": 0.99, "eps": 0.01},
        TORCH,
        norm=40.0,
    ),
    "a3c": Published(
        recipes.a3c(STEPS),
        {"learning_rate": linear(7e-4), "decay": 0.99, "eps": 0.1},
        PLAIN,
    ),
    "a2c": Published(
        recipes.a2c(A2C_STEPS),
        {"learning_rate": linear(7e-4, A2C_STEPS), "decay": 0.99, "eps": 1e-5},
        TENSORFLOW,
        norm=0.5,
        steps=A2C_STEPS,
    ),
    "a2c_stable_baselines3": Published(
        recipes.a2c_stable_baselines3(),
        {"learning_rate": 7e-4, "decay": 0.99, "eps": 1e-5},
        TORCH,
        norm=0.5,
    ),
    "a2c_stable_baselines3 tf_like": Published(
        recipes.a2c_stable_baselines3(tf_like=True),
        {"learning_rate": 7e-4, "decay": 0.99, "eps": 1e-5},
        reference.DIALECTS["stable_baselines3"],
        norm=0.5,
        steps=A2C_STEPS,
    ),
    "inception_v3": Published(
        recipes.inception_v3(1),
        {
            "learning_rate": periods(0.1, 0.16, 30, 30),
            "decay": 0.9,
            "eps": 1.0,
            "momentum": 0.9,
        },
        TENSORFLOW,
    ),
    "efficientnet": Published(
        recipes.efficientnet(5), {"learning_rate": WARMUP, **SEGMENTS}, TENSORFLOW
    ),
    "mnasnet": Published(
        recipes.mnasnet(5, batch_size=256),
        {"learning_rate": WARMUP / 16, **SEGMENTS},
        TENSORFLOW,
    ),
    "mobilenet_v3": Published(
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
    "graves_handwriting": Published(
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
    "char_rnn": Published(
        recipes.char_rnn(4),
        {
            "learning_rate": periods(2e-3, 0.97, 40, 4, 4, 4, 4, 4),
            "decay": 0.95,
            "eps": 1e-8,
        },
        TORCH,
        value=5.0,
    ),
    "wgan critic": Published(
        recipes.wgan("critic"),
        {"learning_rate": 5e-5, "decay": 0.99, "eps": 1e-8},
        TORCH,
        weights=0.01,
    ),
    "wgan generator": Published(
        recipes.wgan("generator"),
        {"learning_rate": 5e-5, "decay": 0.99, "eps": 1e-8},
        TORCH,
    ),
    "stylegan2 generator": Published(
        recipes.stylegan2("generator"),
        {"learning_rate": 0.002 * 4 / 5, "decay": 0.99 ** (4 / 5), **GAN},
        TORCH,
    ),
    "stylegan2 discriminator": Published(
        recipes.stylegan2("discriminator"),
        {"learning_rate": 0.002 * 16 / 17, "decay": 0.99 ** (16 / 17), **GAN},
        TORCH,
    ),
    "biggan generator": Published(
        recipes.biggan("generator"),
        {"learning_rate": 5e-5, "decay": 0.999, **GAN},
        TORCH,
    ),
    "biggan discriminator": Published(
        recipes.biggan("discriminator"),
        {"learning_rate": 2e-4, "decay": 0.999, **GAN},
        TORCH,
    ),
    "netket": Published(
        recipes.netket(), {"learning_rate": 1e-3, "decay": 0.9, "eps": 1e-7}, PLAIN
    ),
    "netket centered": Published(
        recipes.netket(centered=True),
        {"learning_rate": 1e-3, "decay": 0.9, "eps": 1e-7, "centered": True},
        PLAIN,
    ),
    "netket as_documented": Published(
        recipes.netket(as_documented=True),
        {"learning_rate": 1e-3, "decay": 0.9, "eps": 1e-7},
        TORCH,
    ),
    "pennylane": Published(
        recipes.pennylane(), {"learning_rate": 0.01, "decay": 0.9, "eps": 1e-8}, PLAIN
    ),
}


# Variants that repeat another one with other numbers or without the clipping.
REPEATED = {
    "a2c_stable_baselines3 tf_like",
    "wgan generator",
    "stylegan2 discriminator",
    "biggan generator",
    "netket centered",
    "netket as_documented",
}
NAMES = all_by_default_but(REPEATED, PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_the_published_ones(name):
    published = PUBLISHED[name]
    gradients, start = published.gradients(), np.float32(published.start)
    params = jnp.full(gradients.shape[1:], start)
    actual = np.float64(run(published.recipe, gradients, params, how="scan").params)
    expected = published.trajectory()
    assert reference.relative_error(actual - np.float64(start), expected) <= BOUND


@pytest.mark.parametrize("name", NAMES)
def test_every_number_matters(name):
    published = PUBLISHED[name]
    trajectory = published.trajectory()
    has_schedule = np.ndim(published.settings["learning_rate"]) > 0
    for change in published.changes():
        is_moot = not (has_schedule and "momentum" in published.settings)
        if "lr_in_momentum" in change and is_moot:
            continue
        other = published.trajectory(**change)
        assert reference.relative_error(other, trajectory) > 2 * BOUND, change


def test_every_recipe_is_tested():
    tested = {name.split()[0] for name in PUBLISHED} | {"laprop", "dreamer_v3"}
    assert tested | {"cite"} == set(recipes.__all__)


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.impala,
        recipes.impala_torchbeast,
        recipes.impala_cleanba,
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


def test_of_two_networks_one_must_be_named():
    networks = "network must be one of ('{}', '{}'), got 'encoder'."
    for recipe, first, second in [
        (recipes.wgan, "critic", "generator"),
        (recipes.stylegan2, "generator", "discriminator"),
        (recipes.biggan, "generator", "discriminator"),
    ]:
        with pytest.raises(ValueError, match=re.escape(networks.format(first, second))):
            recipe("encoder")


def test_clipped_weights_need_the_parameters_and_leave_integers_alone():
    tx = recipes.wgan("critic")
    params = {"w": jnp.array([0.02, -0.02]), "seen": jnp.array(3)}
    state = tx.init(params)
    gradients = {"w": jnp.zeros(2), "seen": None}
    updates, _ = tx.update(gradients, state, params)
    np.testing.assert_allclose(updates["w"], [-0.01, 0.01], rtol=1e-6)
    assert updates["seen"] is None
    with pytest.raises(ValueError, match="update needs the parameters, to clip"):
        tx.update(gradients, state)


def test_a_batch_of_dqn_zoo():
    """Its epsilon follows the batch, so that the steps are those of a sum."""
    g = jnp.array([0.1, 10.0])
    expected, _ = recipes.dqn().update(g, recipes.dqn().init(g))
    tx = recipes.dqn_zoo(batch_size=64)
    actual, _ = tx.update(g / 64, tx.init(g))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="batch_size must be"):
        recipes.dqn_zoo(batch_size=0)


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "all_recipes.md"
PLACEMENTS = {
    "Optax": PLAIN,
    "TensorFlow 1": TENSORFLOW,
    "RMSpropTFLike": reference.DIALECTS["stable_baselines3"],
    "PyTorch": TORCH,
    "PyTorch's Adam": TORCH,
}


def rows_of_the_page():
    """The cells of every row, by the name of the recipe and of its variant."""
    table = [line for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table
    ]
    return {
        " ".join(re.findall(r"\w+", row[0])): dict(zip(head, row, strict=True))
        for row in rows
    }


def number(cell):
    """The number that a cell begins with, for example ``2e-3 * 4/5, to 0``."""
    text = re.match(r"[\d.e*/^()² +-]*", cell)[0].replace("^", "**")
    return eval(text.replace("²", "**2") or "None")


def test_the_page_has_every_recipe():
    rows = rows_of_the_page()
    variants = PUBLISHED.keys() - {"netket centered"}
    assert rows.keys() == variants | {"laprop", "dreamer_v3"}
    for name, row in rows.items():
        link = re.search(r"\((.*)\)", row["paper"])[1]
        assert link in getattr(recipes, name.split()[0]).__doc__


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - {"netket centered"}))
def test_the_page_has_the_numbers(name):
    row, published = rows_of_the_page()[name], PUBLISHED[name]
    dialect, centered, _ = f"{row['dialect']}, , ".split(", ", 2)
    assert PLACEMENTS[dialect] == published.dialect
    assert (centered == "centered") == published.settings.get("centered", False)
    is_adam = dialect == "PyTorch's Adam"
    assert is_adam == published.settings.get("bias_correction", False)
    assert number(row["decay"]) == pytest.approx(published.settings["decay"])
    assert number(row["epsilon"]) == pytest.approx(published.settings["eps"])
    assert number(row["momentum"]) == published.settings.get("momentum")
    rate = published.settings["learning_rate"]
    if "per 256 images" in row["learning rate"]:
        rate = rate[1] * 25 / {"efficientnet": 16, "mnasnet": 1}[name]
    assert number(row["learning rate"]) == pytest.approx(np.ravel(rate)[0])
    for bound in ("norm", "value", "weights"):
        limit = getattr(published, bound)
        is_named = f"clipped to {limit:g}" in row["loss"].replace("±", "")
        is_named |= row["loss"] == "the same"
        assert is_named == np.isfinite(limit) or row["loss"] == "the same"
