# SPDX-License-Identifier: Apache-2.0
"""What the study of quality measures, on a problem small enough to know the answer."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import optax_rms
from benchmarks import quality, tasks
from benchmarks.tasks import Examples, Task

pytestmark = pytest.mark.slow  # Networks are trained in every cell of the study.

FORMATS = ("float32", "UE6M2", "UE6M2, fitted", "UE6M2, nearest")
DECAYS = (0.9, 0.99, 0.999)
EPS = float(np.finfo(np.float32).eps)


def tiny() -> Task:
    """300 points in 3 classes, with features of very different scale."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 100))
    inputs = jnp.asarray(features * np.logspace(-3, 0, 100), jnp.float32)
    labels = jnp.asarray(features[:, -3:].argmax(axis=1), jnp.int32)
    return Task(nn.Dense(3), Examples(inputs, labels), Examples(inputs, labels))


@pytest.fixture(scope="module")
def rows():
    """The rows of the quick study, by format and decay, as they are saved."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quality, "TASKS", {"digits": tiny})
        formats = {name: quality.FORMATS[name] for name in FORMATS}
        monkeypatch.setattr(quality, "FORMATS", formats)
        watched = []
        measured = quality.measure(
            True, lambda cells, unit: watched.extend(cells) or cells
        )
    assert len(watched) == len(FORMATS)
    rows = json.loads(json.dumps(measured, allow_nan=False))["rows"]
    assert [row["format"] for row in rows[::3]] == list(FORMATS)
    assert [row["decay"] for row in rows[:3]] == list(DECAYS)
    return {
        (row["format"], row["decay"]): {
            name: np.array(value) for name, value in row.items()
        }
        for row in rows
    }


def test_float32_is_no_different_from_itself(rows):
    for decay in DECAYS:
        row = rows["float32", decay]
        # One is fused with other operations than the other.
        assert abs(row["root_bias"]).max() < EPS
        assert row["root_noise"].max() < EPS
        np.testing.assert_allclose(row["step_length"], 1, rtol=EPS)
        assert row["train_loss"].max() < np.log(3)


def test_seeds_differ_more_than_formats(rows):
    for decay in DECAYS:
        losses = rows["float32", decay]["train_loss"]
        change = rows["UE6M2", decay]["train_loss"] - losses
        assert 0 < np.std(change) < np.std(losses)


@pytest.mark.parametrize("format", ["UE6M2", "UE6M2, fitted"])
def test_noise_and_length_of_steps_follow_from_the_format(rows, format):
    # The bound of `Minifloat`.
    bound = np.sqrt(0.35 / 4) / 2
    for decay in DECAYS:
        row = rows[format, decay]
        # The standard error of 300 roots, three times.
        assert (row["root_noise"] > 0.5 * bound).all()
        assert (row["root_noise"] < bound * (1 + 3 / np.sqrt(2 * 300))).all()
        assert (row["step_length"] > 1).all()
        assert (row["step_length"] < 1 + 3 * bound**2).all()


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("RMSProp", "UE6M2@-27*0.99"),
        ("Adam", "UE6M2@-58*0.99"),
        ("Adagrad", "UE6M2@-24*0.99"),
    ],
)
def test_a_fitted_format_has_the_window_of_eps_and_the_decay(optimizer, expected):
    assert quality.fitted(quality.OPTIMIZERS[optimizer], 0.99).name == expected


def test_rounding_to_nearest_is_seen_to_fail(rows):
    to_nearest, stochastic = (
        np.hypot(rows[name, 0.9]["root_bias"], rows[name, 0.9]["root_noise"])
        for name in ("UE6M2, nearest", "UE6M2")
    )
    assert (to_nearest > 3 * stochastic).all()


def test_nearest_bfloat16_is_a_bfloat16_accumulator():
    gradients = jax.random.normal(jax.random.key(0), (50, 1000))
    compressed = optax_rms.compress_state(
        optax_rms.scale_by_rms(), nu=quality.FORMATS["bfloat16, nearest"]
    )
    plain = optax_rms.scale_by_rms(accumulator_dtype=jnp.bfloat16)
    states = [compressed.init(gradients[0]), plain.init(gradients[0])]
    update = [jax.jit(compressed.update), jax.jit(plain.update)]
    for g in gradients:
        states = [update[i](g, state)[1] for i, state in enumerate(states)]
        # All but ties, which one of them rounds to even.
        assert np.mean(states[0].inner_state.nu == states[1].nu) > 0.99


def test_seeds_are_rounded_by_bits_of_their_own():
    optimizer, format = quality.OPTIMIZERS["RMSProp"], quality.FORMATS["UE6M2"]
    run = partial(quality.train, tiny(), optimizer, format, np.float32(0.9))
    seeds = np.arange(2, dtype=np.uint32)
    start = quality.Start(
        seeds,
        {
            "params": {
                "bias": np.zeros(3, np.float32),
                "kernel": np.zeros((100, 3), np.float32),
            }
        },
        np.tile(np.arange(10), (10, 1)),
    )
    axes = (quality.Start(0, None, None),)
    first, second = jax.jit(jax.vmap(run, in_axes=axes))(start).root_noise
    assert first != second


def test_root_error_is_that_of_denominators_with_gradients():
    def state(*squares):
        return optax.ScaleByRmsState(nu={"a": jnp.float32([*squares])})

    ratio = np.exp(2 * np.array([0.3, -0.1])) * 4
    adam = quality.OPTIMIZERS["Adam"]
    bias, noise = quality.root_error(adam, state(0, *ratio), state(0, 4, 4))
    # The root, its logarithm and a mean of two, at eps each; 1e-8 is too small to see.
    assert float(bias) == pytest.approx(0.1, abs=10 * EPS)
    assert float(noise) == pytest.approx(0.2, abs=10 * EPS)


def test_formats_without_stochastic_rounding_differ_in_that_only():
    for name, like in (("UE6M2", optax_rms.UE6M2), ("bfloat16", optax_rms.SE8M7)):
        format = quality.FORMATS[f"{name}, nearest"]
        assert dataclasses.asdict(format) == dataclasses.asdict(like)


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_validation_examples_are_not_trained_on(name):
    task = tasks.TASKS[name]()
    training, validation = (
        {row.tobytes() for row in np.asarray(x.inputs).reshape(len(x.labels), -1)}
        for x in (task.training, task.validation)
    )
    if name == "characters":
        # Windows recur in the text, but begin beyond its trained part.
        assert len(task.training.labels) + 10_000 + tasks.CONTEXT == 120_000
    else:
        assert not training & validation


def test_only_cells_that_were_apart_are_repeated_with_new_seeds(monkeypatch):
    monkeypatch.setattr(quality, "TASKS", {"tiny": tiny})
    monkeypatch.setattr(quality, "UNBIASED", ("UE6M2",))
    float32 = {"train_loss": [1.0, 2.0, 3.0], "validation_loss": [1.0, 2.0, 3.0]}
    first = []
    for decay, higher in ((0.9, 0.99), (0.99, 1.01), (0.999, -0.99)):
        row = {"task": "tiny", "optimizer": "RMSProp", "decay": decay}
        apart = float32 | {"validation_loss": [x + higher for x in (1.0, 2.0, 3.0)]}
        first.append(row | {"format": "float32"} | float32)
        first.append(row | {"format": "UE6M2"} | apart)
        # Not one of those that are repeated.
        first.append(row | {"format": "UE6M2, nearest"} | {k: [9, 9, 9] for k in apart})
    repeated = quality.repeat({"steps": 3, "rows": first}, lambda cells, unit: cells)
    assert [(row["format"], row["decay"]) for row in repeated["rows"]] == [
        ("float32", 0.99),
        ("UE6M2", 0.99),
    ]
    assert set(quality.NEW_SEEDS).isdisjoint(range(quality.SEEDS))
    losses = repeated["rows"][0]["train_loss"]
    assert len(set(losses)) == repeated["seeds"] == 20
