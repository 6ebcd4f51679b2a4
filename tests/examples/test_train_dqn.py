# SPDX-License-Identifier: Apache-2.0
"""DQN: its memory, its loss, its four optimizers, and a run that is continued."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
import train_dqn
from common import deep_q
from helpers import frameworks

# A whole program runs for them.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def small():
    """Short epochs; most of the time is that of the compiler."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        for name, frames in {
            "CAPACITY": 150,
            "EPOCH_FRAMES": 200,
            "FIRST_FRAMES": 50,
            "FRAMES_PER_TARGET": 100,
        }.items():
            patch.setattr(deep_q, name, frames)
        yield patch
    jax.config.update("jax_disable_most_optimizations", False)


class Counting:
    """A game whose observation is the number of the frame, in binary digits."""

    num_actions = 3

    def observation_space(self, parameters):
        return SimpleNamespace(shape=(4, 4, 1))

    def reset(self, key, parameters):
        return self.observe(0), jnp.int32(0)

    def observe(self, n):
        return ((n >> jnp.arange(16)) & 1).reshape(4, 4, 1)

    def step(self, key, n, action, parameters):
        reward, terminated, truncated = n * 1.0, n % 5 == 0, n % 7 == 0
        return self.observe(n + 1), n + 1, reward, terminated, truncated, {}


def number(packed):
    bits = np.unpackbits(np.asarray(packed), axis=-1).astype(int)
    return (bits << np.arange(16)).sum(-1)


@pytest.fixture(scope="module")
def counting():
    rule = deep_q.Rule(optax.sgd(0.0), 1, eps=1.0, eps_in_sqrt=True)
    return deep_q.Trainer(Counting(), None, [rule], num_seeds=2)


@pytest.mark.parametrize("frames", [50, 400], ids=["filling", "full"])
def test_sampled_frames_are_in_order(counting, monkeypatch, frames):
    monkeypatch.setattr(deep_q, "BATCH_SIZE", 2000)
    play = jax.jit(
        lambda agents: jax.lax.scan(
            lambda a, _: counting._play(a), agents, None, frames - 50
        )
    )
    agents, _ = play(counting.start())
    batch = jax.jit(lambda agents: counting.sample(agents))(agents)
    n = number(batch.observation)
    np.testing.assert_array_equal(batch.reward, n)
    np.testing.assert_array_equal(batch.ended, (n % 5 == 0) | (n % 7 == 0))
    np.testing.assert_array_equal(number(batch.next_observation), n + 1)
    # All that are there, but for the newest, whose next observation is missing. Of
    # 2,000 draws from 149 frames, one is missing with a probability of 149 * e^-13.4.
    oldest = max(0, frames - deep_q.CAPACITY)
    for seed in range(2):
        assert set(n[seed]) == set(range(oldest, frames - 1))
    assert (n[0] != n[1]).any()


def test_loss_is_the_sum_of_clipped_halves_of_squares(counting):
    """Half of the squared error up to 1, and the error minus a half beyond."""

    @jax.jit
    def evaluate(agents):
        params, target = (
            jax.tree.map(lambda x, i=i: 3 * x[i], agents.params) for i in (0, 1)
        )
        batch = jax.tree.map(lambda x: x[0], counting.sample(agents))
        batch = batch._replace(reward=jnp.linspace(-3, 3, deep_q.BATCH_SIZE))
        values = counting.network.apply(params, batch.observation)
        next_values = counting.network.apply(target, batch.next_observation)
        return batch, values, next_values, counting.loss(params, target, batch)

    found = jax.tree.map(np.asarray, evaluate(counting.start()))
    batch, values, next_values, loss = found
    value = values[np.arange(deep_q.BATCH_SIZE), batch.action].astype(float)
    follows = np.where(batch.ended, 0, next_values.max(axis=-1))
    error = abs(batch.reward + 0.99 * follows - value)
    assert 0 < np.sum(error < 1) < deep_q.BATCH_SIZE
    expected = np.where(error < 1, error**2 / 2, error - 1 / 2).sum()
    # 32 terms, each with a few roundings of float32.
    np.testing.assert_allclose(loss, expected, rtol=32 * 2**-23)


def test_first_step_of_each_optimizer():
    """From averages of 0, written out in float64, for gradients of a sum."""
    g = np.array([1e-2, 0.3, 10.0])
    mean_square, variance = 0.05 * g**2, 0.05 * g**2 - (0.05 * g) ** 2
    h = g / 32
    expected = [
        g / np.sqrt(variance + 0.01),
        g / np.sqrt(mean_square + 0.01),
        g / (np.sqrt(variance) + 0.01),
        h / np.sqrt(0.05 * h**2 - (0.05 * h) ** 2 + 0.01),
    ]
    for rule, step in zip(train_dqn.rules(2.0), expected, strict=True):
        gradient = jnp.asarray(rule.loss_scale * g, jnp.float32)
        state = rule.optimizer.init(jnp.zeros(3))
        updates, _ = rule.optimizer.update(gradient, state, jnp.zeros(3))
        # A dozen roundings of float32.
        np.testing.assert_allclose(updates, -2 * step, rtol=12 * 2**-24)
        assert rule.eps == 0.01


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The folders of a run, and of one that was interrupted, and both results."""
    frameworks.require("gymnax")
    made = []

    Trainer, start = deep_q.Trainer, deep_q.Trainer.start

    def once(*args):
        """The same trainer, whose programs are compiled, for all calls."""
        made.append(made[0] if made else Trainer(*args))
        return made[-1]

    def committed(trainer):
        # To a device, as a checkpoint is, for which JAX would compile anew.
        return jax.device_put(start(trainer), jax.devices()[0])

    small.setattr(Trainer, "start", committed)
    small.setattr(deep_q, "Trainer", once)
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "interrupted")]
    whole, interrupted = ([f"--output={folder}", "--seeds=2"] for folder in folders)
    train_dqn.main([*whole, "--epochs=2"])
    train_dqn.main([*interrupted, "--epochs=1"])
    train_dqn.main([*interrupted, "--epochs=2", "--resume"])
    return folders[0], *(
        json.loads((f / "train_dqn.json").read_text()) for f in folders
    )


def test_a_resumed_run_ends_with_the_same_numbers(finished):
    _, whole, resumed = finished
    assert resumed["command"].endswith("--resume")
    assert resumed["runs"] == whole["runs"]
    assert whole["frames"] == [200, 400]
    assert {"date", "machine", "versions", "gymnax"} < whole.keys()


def test_optimizers_differ_in_the_right_direction(finished):
    """Random weights have small gradients at first, smaller ones of a mean."""
    _, whole, _ = finished
    assert list(whole["runs"]) == list(train_dqn.COLORS)
    shares = {
        name: np.array(run["ruled_by_eps"])[-1] for name, run in whole["runs"].items()
    }
    assert (shares["mean loss"] == 1).all()
    # The root of a variance is above 0.01 if the variance is above 0.0001.
    assert (shares["epsilon outside"] < shares["recipes.dqn"]).all()
    losses = [run["loss"] for run in whole["runs"].values()]
    assert all(a != b for i, a in enumerate(losses) for b in losses[:i])
    for run in whole["runs"].values():
        assert np.array(run["return"]).shape == (2, 2)
        assert (np.array(run["return"]) >= 0).all()


def test_picture(finished):
    folder, *_ = finished
    picture = matplotlib.image.imread(folder / "train_dqn.png")
    assert picture.shape == (600, 1650, 4)
    colors = {tuple(color) for color in picture[..., :3].reshape(-1, 3).round(2)}
    for name, color in train_dqn.COLORS.items():
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert tuple(np.asarray(rgb, np.float32).round(2)) in colors, name


def test_docs_are_right_about_the_results():
    """What docs/train_dqn.md says about the seeds of the committed run."""
    root = Path(__file__).parents[2]
    committed = json.loads((root / "benchmarks/results/train_dqn.json").read_text())
    returns = {
        name: train_dqn.last_fifth(run["return"])
        for name, run in committed["runs"].items()
    }
    recipe = returns["recipes.dqn"]
    fifth = len(committed["frames"]) // 5
    early = {
        name: np.mean(run["return"][:fifth], axis=0)
        for name, run in committed["runs"].items()
    }
    assert (early["epsilon outside"] > early["recipes.dqn"]).all()
    for name in ("epsilon outside", "not centered"):
        differences = returns[name] - recipe
        assert abs(differences.mean()) < differences.std(ddof=1)
    assert all(
        (returns["mean loss"] < r).all() for n, r in returns.items() if n != "mean loss"
    )
    assert np.min(committed["runs"]["mean loss"]["ruled_by_eps"]) > 0.999


def test_without_gymnax_it_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    program = runpy.run_path(train_dqn.__file__)
    with pytest.raises(SystemExit) as exit_info:
        program["main"]([f"--output={tmp_path}"])
    expected = 'train_dqn.py needs gymnax: pip install -e ".[rl]"'
    assert str(exit_info.value).startswith(expected)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--environment=Pong-v5", "Breakout-MinAtar"),
        ("--seeds=0", "a whole number from 1 to 100, not '0'"),
        ("--epochs=x", "a whole number of at least 1, not 'x'"),
    ],
)
def test_bad_values_are_refused_in_one_line(capsys, option, expected):
    with pytest.raises(SystemExit):
        train_dqn.main([option])
    (line,) = capsys.readouterr().err.splitlines()
    assert option.split("=")[0] in line
    assert expected in line
