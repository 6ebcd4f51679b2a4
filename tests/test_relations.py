# SPDX-License-Identifier: Apache-2.0
"""How RMSProp is related to Adam, Adagrad, momentum and sign descent, all of Optax."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.on_request import first_by_default
from helpers.reference import gradient_stream, relative_error
from helpers.running import run
from helpers.trajectory import rounding_bound, x64

import optax_rms

STEPS = 1000
RATE = 0.01


@pytest.fixture(params=["float32", "float64"])
def gradients(request):
    """Gradients `[steps, 12]` in both precisions; some columns lie around 1e-4."""
    precision = x64() if request.param == "float64" else contextlib.nullcontext()
    # Optax's bias correction multiplies a step count with a float.
    with precision, jax.numpy_dtype_promotion("standard"):
        yield gradient_stream(STEPS, eps=1e-8).astype(request.param)


def path_error(tx, expected, gradients):
    """Distance of two paths along the same gradients, relative to their length."""
    paths = [run(each, gradients, how="jit").path for each in (tx, expected)]
    return relative_error(*paths)


def averaging_bound(dtype, decay):
    """What rounding may do to the path under a bias-corrected moving average.

    Each of the average and the sum of its weights rounds three times per step, and a
    step counts 1 / (1 - decay) times in all; ten roundings come after.
    """
    return (2 * 3 / (1 - decay) + 10) * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_bias_corrected_with_eps_outside_is_adam_without_momentum(gradients, decay):
    # As large as the middle gradients, so that its place decides about the step.
    eps = 1e-4
    rmsprop = optax_rms.rmsprop(
        RATE, decay=decay, eps=eps, eps_in_sqrt=False, bias_correction=True
    )
    adam = optax.adam(RATE, b1=0.0, b2=decay, eps=eps)
    error = path_error(rmsprop, adam, gradients)
    assert error <= averaging_bound(gradients.dtype, decay)


def test_adam_is_averaged_gradient_over_denominator_of_rmsprop(gradients):
    b1, b2, eps = 0.9, 0.999, 1e-4
    # A denominator shows only where there is something to divide.
    gradients = gradients[:, np.all(gradients != 0, axis=0)]
    assert gradients.shape[1] == 10

    rms = optax_rms.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    denominators = gradients / run(rms, gradients, how="jit").updates
    ages = np.arange(1, STEPS + 1)[:, None]
    traces = run(optax.trace(b1), gradients, how="jit").updates
    averages = traces * (1 - b1) / (1 - b1**ages)
    expected = np.cumsum(-RATE * averages / denominators, axis=0, dtype=np.float64)
    adam = optax.adam(RATE, b1, b2, eps)
    error = relative_error(run(adam, gradients, how="jit").path, expected)
    assert error <= averaging_bound(gradients.dtype, b2)


def test_adagrad_is_rmsprop_that_forgets_nothing(gradients):
    eps = 1e-8
    rmsprop = optax.inject_hyperparams(optax_rms.rmsprop)(
        learning_rate=lambda count: RATE / jnp.sqrt(count + 1.0),
        decay=lambda count: 1 - 1 / (count + 1.0),
        eps=lambda count: eps / (count + 1.0),
    )
    adagrad = optax.adagrad(RATE, initial_accumulator_value=0.0, eps=eps)
    error = path_error(rmsprop, adagrad, gradients)
    assert error <= rounding_bound(gradients.dtype, STEPS)


def test_mean_square_of_rmsprop_times_t_is_accumulator_of_adagrad(gradients):
    rms = optax.inject_hyperparams(optax_rms.scale_by_rms)(
        decay=lambda count: 1 - 1 / (count + 1.0)
    )
    rss = optax.scale_by_rss(initial_accumulator_value=0.0)

    means = optax.tree.get(run(rms, gradients, how="scan").state, "nu")
    sums = optax.tree.get(run(rss, gradients, how="scan").state, "sum_of_squares")
    ages = np.arange(1, STEPS + 1)[:, None]
    np.testing.assert_allclose(
        ages * means, sums, rtol=rounding_bound(gradients.dtype, STEPS)
    )


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_rmsprop_without_memory_is_sign_descent(eps_in_sqrt):
    rng = np.random.default_rng(0)
    powers = 2.0 ** np.arange(-60, 61)
    gradients = rng.choice([-1, 1], (50, 121)) * powers
    gradients[:, 60] = 0
    rmsprop = optax_rms.rmsprop(RATE, decay=0.0, eps=0.0, eps_in_sqrt=eps_in_sqrt)
    # Powers of two have exact squares, roots and reciprocals.
    gradients = gradients.astype(np.float32)
    assert path_error(rmsprop, optax.sign_sgd(RATE), gradients) == 0


@pytest.mark.parametrize("eps_in_sqrt", [False, True])
def test_without_memory_every_step_is_a_sign(gradients, eps_in_sqrt):
    rms = optax_rms.scale_by_rms(decay=0.0, eps=0.0, eps_in_sqrt=eps_in_sqrt)
    updates, _ = rms.update(gradients, rms.init(gradients))
    # The square, the root, its reciprocal and the product round, the root to two ulp.
    eps = float(jnp.finfo(gradients.dtype).eps)
    signs = np.asarray(jnp.sign(gradients))
    np.testing.assert_allclose(np.asarray(updates), signs, rtol=4 * eps)


@pytest.mark.parametrize("lr_in_momentum", [False, True])
@pytest.mark.parametrize("momentum", first_by_default([0.9, None]))
def test_constant_denominator_leaves_momentum(gradients, momentum, lr_in_momentum):
    rmsprop = optax_rms.rmsprop(
        4 * RATE,
        decay=1.0,
        eps=0.0,
        initial_scale=16.0,
        momentum=momentum,
        lr_in_momentum=lr_in_momentum,
    )
    sgd = optax.sgd(RATE, momentum)
    error = path_error(rmsprop, sgd, gradients)
    assert error <= averaging_bound(gradients.dtype, momentum or 0.0)
