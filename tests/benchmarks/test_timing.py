# SPDX-License-Identifier: Apache-2.0
"""Sides alternate, warm-up does not count, and the median is that of the rounds."""

import statistics
import time

import pytest

from benchmarks import timing


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a side says so."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def side(clock, calls, name, seconds):
    """A side that takes these seconds per step, one entry for each call."""
    remaining = iter(seconds)

    def run(steps):
        calls.append(name)
        clock.now += steps * next(remaining)

    return run


def test_medians_and_quartiles_without_the_warm_up(clock):
    calls = []
    sides = {
        "a": side(clock, calls, "a", [100.0, 100.0, 1.0, 2.0, 3.0, 4.0, 50.0]),
        "b": side(clock, calls, "b", 7 * [10.0]),
    }
    found = timing.alternate(sides, steps=3, rounds=5, warm_up=2)
    assert found["a"] == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
        "rounds": 5,
    }
    assert found["b"]["median"] == 10.0


def test_each_round_has_all_sides_in_an_order_of_its_own(clock):
    calls = []
    sides = {n: side(clock, calls, n, 40 * [1.0]) for n in "abc"}
    timing.alternate(sides, rounds=20)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 22
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 3


@pytest.mark.parametrize(
    ("seconds", "rounds"), [(0.0, 20), (30.0, 30 - 2), (1000.0, 200)]
)
def test_quick_sides_get_more_rounds(clock, seconds, rounds):
    sides = {"a": side(clock, [], "a", 500 * [1.0])}
    assert timing.alternate(sides, seconds=seconds)["a"]["rounds"] == rounds


def test_one_value_is_its_own_quartiles():
    found = timing.summary([0.5])
    assert found["lower_quartile"] == found["median"] == found["upper_quartile"] == 0.5


def test_seconds_of_the_real_clock():
    slept = []

    def sleep(steps):
        start = time.perf_counter()
        time.sleep(0.02 * steps)
        slept.append((time.perf_counter() - start) / steps)

    found = timing.alternate({"sleep": sleep}, steps=2, rounds=3, warm_up=0)
    # Other work on the machine prolongs the sleep itself.
    median = statistics.median(slept)
    assert 0.02 <= median <= found["sleep"]["median"] < 2 * median
