# SPDX-License-Identifier: Apache-2.0
"""Timing of alternatives side by side."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def alternate(
    sides: Mapping[str, Callable[[int], Any]],
    steps: int = 1,
    rounds: int = 20,
    seconds: float = 0.0,
    warm_up: int = 2,
) -> dict[str, dict[str, float]]:
    """Time all sides in turn, in a new random order each round.

    A slow phase of the machine, for example another program, then affects all sides.

    Args:
      sides: functions to time, by name; each takes a number of steps and blocks until
        the last step is done.
      steps: how many steps a call takes.
      rounds: number of rounds, at least.
      seconds: go on for this long, but not for more than ten times the rounds.
      warm_up: rounds that are not counted.

    Returns:
      The `summary` of the seconds per step of each side, by name.
    """
    order, shuffle = list(sides), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    done = -warm_up
    while done < rounds or (done < 10 * rounds and time.perf_counter() < end):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            sides[name](steps)
            elapsed = time.perf_counter() - start
            if done >= 0:
                times[name].append(elapsed / steps)
        done += 1
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles, which a few slow rounds do not move."""
    lower, median, upper = values * 3 if len(values) == 1 else quartiles(values)
    return {
        "median": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "rounds": len(values),
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")
