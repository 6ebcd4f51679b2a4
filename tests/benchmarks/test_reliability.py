# SPDX-License-Identifier: Apache-2.0
"""A short form of `python -m benchmarks.reliability`, and that its checks can fail."""

import collections
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.comparison import assert_same_bits

from benchmarks import (
    damage,
    extreme_gradients,
    kills,
    reliability,
    report,
    small_run,
    soak,
)
from benchmarks.processes import in_new_process
from examples.common import checkpoints, command_line
from optax_rms import rmsprop

CASES = 30  # of one variant and dtype; the others are for the command


def in_silence(iterable, **_):
    return iterable


def test_extreme_gradients_touch_their_own_elements_only():
    counts = extreme_gradients.measure(CASES, ["centered"], ["float32"])
    assert counts["cases"] >= CASES
    assert counts["finite_cases"] > 0
    assert counts["skipped_steps"] > 0
    assert counts["bits_compared"] > CASES


def normalized(decay, eps):
    """Clipping by the norm of all gradients."""
    return optax.chain(optax.clip_by_global_norm(1.0), rmsprop(0.1, decay, eps))


def unguarded(decay, eps):
    """The root of 0 over itself."""

    def update(updates, state, params=None):
        del params
        mean = jax.tree.map(lambda g: g / jnp.sqrt(jnp.square(g)), updates)
        return mean, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


@pytest.mark.parametrize(
    ("build", "message"),
    [(normalized, "another element changed"), (unguarded, "finite gradients gave")],
)
def test_extreme_gradients_find_a_bad_optimizer(monkeypatch, build, message):
    variants = {build.__name__: extreme_gradients.Variant(build)}
    monkeypatch.setattr(extreme_gradients, "VARIANTS", variants)
    element = (1, "b", 0, 0.0 if build is unguarded else 1e20)
    case = extreme_gradients.Case(
        build.__name__, 4, False, "float32", 0.9, 1e-8, 0, 1.0, [element]
    )
    with pytest.raises(AssertionError, match=message):
        extreme_gradients.check(case, collections.Counter())


def largest_bias(row):
    """Four deviations of the mean of the noise, which is independent 2 / (1 - decay)
    steps apart; the heavy tails of squares make it up to twice as large.
    """
    independent = soak.ELEMENTS * row["steps"] * (1 - soak.DECAY) / 2
    return 4 * 2 * (2 * row["stated_noise"]) / independent**0.5


def test_averages_in_one_byte_do_not_drift():
    row = soak.drift("UE6M2", 2000)
    assert abs(np.mean(row["bias"])) < largest_bias(row)
    # 640 independent values have a deviation with an error of 3 %.
    assert row["noise"] == pytest.approx(row["stated_noise"], rel=0.1)


@pytest.mark.slow
def test_drift_is_found(monkeypatch):
    """Rounding down, for example, is biased."""
    monkeypatch.setattr(
        "optax_rms.storage._compress_state.rounding_bits",
        lambda shape, step, leaf, seed: jnp.zeros(shape, jnp.uint32),
    )
    jax.clear_caches()
    row = soak.drift("UE6M2", 2000)
    jax.clear_caches()
    assert abs(np.mean(row["bias"])) > largest_bias(row)


def test_counters_go_on_across_their_ends():
    found = soak.counters()
    assert found["finite"]
    assert found["rounding_differs"]
    assert len(found["crossings"]) == 8
    for row in found["crossings"]:
        assert row["to"] == row["expected"], row


def test_eight_threads_agree_with_one():
    found = soak.threads(8, 2)
    assert found["different"] == 0
    assert found["bits_compared"] > 0


# Orbax leaves tasks behind where it fails, which must not reach other tests.
@pytest.mark.slow
def test_damaged_checkpoints_are_not_used(tmp_path):
    found = in_new_process(damage.measure_damage, 3, tmp_path, in_silence)
    for row in found.values():
        assert row["cases"] == row["previous_restored"] == 1


@pytest.mark.slow
def test_foreign_checkpoints_are_not_used(tmp_path):
    rows = in_new_process(damage.measure_others, tmp_path)
    assert len(rows) == 2 * len(damage.others())
    for row in rows:
        assert row["refused"], row
        assert row["unchanged"], row


def save_to_full_disk(folder):
    """As a limit for the size of a file."""
    state = small_run.create(small_run.optimizer(), width=64)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoints.open_folder(folder) as manager:
        checkpoints.save(manager, state, [{}], small_run.SETTINGS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(command_line.InputError, match=r"epoch 2.* too large"):
            checkpoints.save(manager, state, [{}, {}], small_run.SETTINGS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with checkpoints.open_folder(folder) as manager:
        assert manager.all_steps() == [1]
        restored, _ = checkpoints.restore(manager, state, small_run.SETTINGS)
    assert_same_bits(restored.params, state.params)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    in_new_process(save_to_full_disk, tmp_path)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    found = kills.measure_alone(2, 6, tmp_path, in_silence)
    assert found["kills"] == 2
    assert found["ends"] > 0
    assert found["different_ends"] == 0
    assert found["bits_compared"] > 0


def test_command_keeps_the_results_of_other_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(
        reliability,
        "PARTS",
        {name: lambda *_, name=name: {"part": name} for name in reliability.PARTS},
    )
    for part in ("soak", "kills"):
        assert reliability.main(["--only", part, "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "reliability.json").read_text())["measured"]
    assert [saved[part]["part"] for part in ("soak", "kills")] == ["soak", "kills"]
    assert report.TABLES["kills"](tmp_path / "nowhere") == "not measured\n"
