# SPDX-License-Identifier: Apache-2.0
"""`optax_rms.rmsprop` against ``jax.example_libraries.optimizers``, step for step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference
from helpers.running import run
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.example_libraries import optimizers

import optax_rms

BOUND = 2e-5

CASES = {
    "defaults": {},
    "gamma": {"gamma": 0.99},
    "eps": {"eps": 1e-3},
    "momentum": {"momentum": 0.9},
    "momentum of zero": {"momentum": 0.0},
    "all": {"gamma": 0.8, "eps": 1e-4, "momentum": 0.5},
}


def changing_rates(steps):
    t = np.arange(steps)
    return (1e-2 * (1 + 0.5 * np.sin(t)) * 0.3 ** (4 * t // steps)).astype(np.float32)


@jax.jit
def run_theirs(arguments, gradients, rates):
    """Parameters after every step, the last mean square, and the last momentum."""
    name = "rmsprop_momentum" if "momentum" in arguments else "rmsprop"
    init, update, get_params = getattr(optimizers, name)(
        lambda i: rates[i], **arguments
    )

    def step(state, inputs):
        state = update(*inputs, state)
        return state, get_params(state)

    counts = jnp.arange(len(gradients))
    state, trajectory = jax.lax.scan(
        step, init(jnp.zeros(gradients.shape[1:])), (counts, gradients)
    )
    _, *slots = jax.tree.leaves(state)
    return trajectory, slots


@jax.jit
def run_ours(arguments, gradients, rates):
    """The same, with the settings that docs/other_frameworks.md has for it."""
    arguments = dict(arguments)
    tx = optax_rms.rmsprop(
        lambda count: rates[count],
        decay=arguments.pop("gamma", 0.9),
        eps=arguments.pop("eps", 1e-8),
        **arguments,
    )

    history = run(tx, gradients, how="scan")
    _, state = history.last
    momentum = [-state[2].trace] if "momentum" in arguments else []
    return history.params, [state[0].nu, *momentum]


def assert_agreement(arguments, gradients, rates):
    theirs, (their_nu, *their_momentum) = run_theirs(arguments, gradients, rates)
    ours, (our_nu, *our_momentum) = run_ours(arguments, gradients, rates)
    assert reference.relative_error(ours, np.float64(theirs)) <= BOUND
    assert np.all(np.abs(our_nu - their_nu) <= BOUND * their_nu)
    for ours, theirs in zip(our_momentum, their_momentum, strict=True):
        assert np.all(np.abs(ours - theirs) <= BOUND * np.max(np.abs(theirs)))


@pytest.mark.parametrize("steps", [75, 1000])
@pytest.mark.parametrize("name", CASES)
def test_trajectory_and_state(name, steps):
    eps = CASES[name].get("eps", 1e-8)
    gradients = reference.gradient_stream(steps, eps)
    assert_agreement(CASES[name], gradients, changing_rates(steps))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    gamma=st.floats(0.0, 0.999),
    eps=st.sampled_from([1e-10, 1e-6, 1e-2]),
    momentum=st.none() | st.floats(0.0, 0.99),
    seed=st.integers(0, 1000),
)
def test_agreement_at_random_hyperparameters(gamma, eps, momentum, seed):
    arguments = {"gamma": gamma, "eps": eps}
    if momentum is not None:
        arguments["momentum"] = momentum
    gradients = reference.gradient_stream(30, eps, seed)
    assert_agreement(arguments, gradients, changing_rates(30))


def test_the_data_reject_every_other_dialect():
    gradients, rates = reference.gradient_stream(75, 1e-8), changing_rates(75)
    theirs, _ = run_theirs(CASES["momentum"], gradients, rates)
    errors = {
        name: reference.relative_error(
            reference.rmsprop(gradients, rates, momentum=0.9, **dialect),
            np.float64(theirs),
        )
        for name, dialect in reference.DIALECTS.items()
    }
    assert errors.pop("optax") <= BOUND
    assert min(errors.values()) >= 100 * BOUND, errors
