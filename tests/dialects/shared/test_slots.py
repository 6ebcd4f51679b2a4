# SPDX-License-Identifier: Apache-2.0
"""Slots of frameworks as fields of a state, and back."""

import numpy as np
import pytest

from optax_rms.dialects._shared import slots
from optax_rms.dialects._shared.inverse import exact_inverse

NAMES = {"velocity": "nu", "average_gradient": "mu", "momentum": "trace"}


@pytest.mark.parametrize("negate_momentum", [True, False])
def test_fields_of_slots(negate_momentum):
    arrays = {
        "velocity": np.float32([5.0, 9.0]),
        "average_gradient": np.float32([2.0, -3.0]),
        "momentum": np.float32([0.5, -0.5]),
        "average": np.float32([7.0, 8.0]),
    }
    fields = slots.to_fields(arrays, NAMES, negate_momentum=negate_momentum)
    assert fields.keys() == {"variance", "mu", "trace", "average"}
    np.testing.assert_array_equal(fields["variance"], [1.0, 0.0])
    sign = -1 if negate_momentum else 1
    np.testing.assert_array_equal(fields["trace"], sign * arrays["momentum"])
    back = slots.to_slots(fields, NAMES, np.float32, negate_momentum=negate_momentum)
    assert back.keys() == arrays.keys()
    for slot, array in arrays.items():
        np.testing.assert_array_equal(back[slot], array)
        assert back[slot].dtype == array.dtype
    assert slots.to_fields({"velocity": arrays["velocity"]}, NAMES).keys() == {"nu"}


def test_half_precision_comes_back():
    """The square subtracted on import is that of the mean rounded to the dtype."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=1000).astype(np.float16)
    wide = np.float64(mean) ** 2 + rng.random(1000)
    arrays = {"velocity": wide.astype(np.float16), "average_gradient": mean}
    fields = slots.to_fields({k: np.float32(x) for k, x in arrays.items()}, NAMES)
    exported = slots.to_slots(fields, NAMES, np.float16)
    again = slots.to_fields({k: np.float32(x) for k, x in exported.items()}, NAMES)
    for field in fields:
        np.testing.assert_array_equal(again[field], fields[field])


def test_means_are_rounded_before_they_are_squared():
    """Then only the mean square rounds, by half a unit in its last place."""
    rng = np.random.default_rng(0)
    mean = rng.uniform(1, 2, 1000).astype(np.float32)
    fields = {"mu": mean, "variance": rng.random(1000).astype(np.float32) / 10}
    exported = slots.to_slots(fields, NAMES, np.float16)
    again = slots.to_fields({k: np.float32(x) for k, x in exported.items()}, NAMES)
    error = np.abs(again["variance"] - fields["variance"])
    bound = float(np.finfo(np.float16).eps) / 2 * np.float32(exported["velocity"])
    # Beside it, float32 rounds too little to see.
    assert (error <= 1.001 * bound).all()


@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 2])
def test_exact_inverse(steps):
    """A guess is mended if it is one number off, and otherwise left alone."""

    def function(x):
        return x * np.float32(3)  # Below 4, no two of the products are the same.

    original = np.linspace(1.1, 1.3, 1000, dtype=np.float32)
    guess = original
    for _ in range(abs(steps)):
        guess = np.nextafter(guess, np.float32(np.inf * steps))
    expected = original if abs(steps) < 2 else guess
    actual = exact_inverse(function, guess, function(original))
    np.testing.assert_array_equal(actual, expected)
