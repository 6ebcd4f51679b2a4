# SPDX-License-Identifier: Apache-2.0
"""Where periods end, also if a compiler divides by multiplying."""

import jax
import numpy as np
import pytest

from optax_rms.dialects.keras import _schedules as schedules

PERIODS = [7, 13, 41, 98.4, 312.5, 1251]


def compiled(name, period, **config):
    key = "first_decay_steps" if name == "CosineDecayRestarts" else "decay_steps"
    return jax.jit(
        schedules.from_config(
            {
                "class_name": name,
                "config": {"initial_learning_rate": 1.0, key: period} | config,
            }
        )
    )


def steps_and_quotients(period):
    """The steps around the ends of periods, and how many periods they are."""
    ends = np.arange(1, 60) * period
    steps = np.unique([np.floor(ends), np.ceil(ends), np.ceil(ends) + 1]).astype(int)
    return zip(steps, steps.astype(np.float32) / np.float32(period), strict=True)


@pytest.mark.parametrize("period", PERIODS)
def test_staircase(period):
    schedule = compiled("ExponentialDecay", period, decay_rate=0.5, staircase=True)
    for step, quotient in steps_and_quotients(period):
        assert schedule(step) == 0.5 ** np.floor(quotient), step


@pytest.mark.parametrize("period", PERIODS)
def test_polynomial_cycle(period):
    schedule = compiled("PolynomialDecay", period, end_learning_rate=0.0, cycle=True)
    for step, quotient in steps_and_quotients(period):
        expected = 1 - quotient / np.ceil(quotient)
        # A quotient that rounding made whole is whole to the schedule, too.
        np.testing.assert_allclose(schedule(step), expected, atol=1e-6, err_msg=step)


@pytest.mark.parametrize("period", PERIODS)
def test_restarts_of_equal_length(period):
    schedule = compiled("CosineDecayRestarts", period, t_mul=1.0, m_mul=0.5)
    for step, quotient in steps_and_quotients(period):
        restarts = np.floor(quotient)
        expected = 0.5**restarts * (1 + np.cos(np.pi * (quotient - restarts))) / 2
        # Of a fraction, the rounding of 60 periods, times the slope of the cosine.
        np.testing.assert_allclose(
            schedule(step), expected, rtol=0, atol=60 * 2**-24 * np.pi, err_msg=step
        )


@pytest.mark.parametrize("module", ["keras.src.optimizers", "tf_keras.src.optimizers"])
def test_schedule_objects_of_both_kinds_of_keras(module):
    """They compute with their own backend, which JAX cannot trace."""

    class ExponentialDecay:
        def get_config(self):
            return {
                "initial_learning_rate": 0.5,
                "decay_steps": 2,
                "decay_rate": 0.5,
                "staircase": False,
                "name": None,
            }

        def __call__(self, step):
            raise AssertionError("not traced")

    ExponentialDecay.__module__ = module
    assert jax.jit(schedules.from_object(ExponentialDecay()))(2) == 0.25
    ExponentialDecay.__module__ = "mine"
    own = ExponentialDecay()
    assert schedules.from_object(own) is own


@pytest.mark.parametrize("marks", [{"module": None}, {"registered_name": "Custom>E"}])
def test_a_users_class_of_the_same_name_is_refused(marks):
    config = {"initial_learning_rate": 0.5, "decay_steps": 2, "decay_rate": 0.5}
    serialized = {"class_name": "ExponentialDecay", "config": config}
    assert schedules.from_config(serialized)(2) == 0.25
    with pytest.raises(ValueError, match=r"got the class ExponentialDecay\. Pass l"):
        schedules.from_config(serialized | marks)
