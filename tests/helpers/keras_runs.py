# SPDX-License-Identifier: Apache-2.0
"""Running RMSProp of Keras, and the dialect, on given gradients."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from helpers.frameworks import require
from helpers.reference import gradient_stream, relative_error
from helpers.running import run
from helpers.trajectory import alternating_stream

with warnings.catch_warnings():
    # Keras, and packages that Keras imports, use deprecated functions of others.
    warnings.simplefilter("ignore", DeprecationWarning)
    keras = require("keras")

# Of the length of the path: five times eps * sqrt(1000 steps), a walk of roundings.
BOUND = 2e-5
EPSILON = 1e-7


def standard_promotion(function):
    """Keras mixes dtypes."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped


class Rates(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that changes at every step, by up to a factor of ten."""

    def __call__(self, step):
        return 10 ** (jnp.sin(1.7 * jnp.asarray(step, float)) / 2) * 0.02

    @staticmethod
    def array(steps):
        return 10 ** (np.sin(1.7 * np.arange(steps)) / 2) * 0.02


def split(columns):
    """Two parameters of different shapes, with a different norm each."""
    columns = np.asarray(columns)
    first = columns.shape[-1] // 3
    shape = (*columns.shape[:-1], 2, first)
    return {"bias": columns[..., :first], "kernel": columns[..., first:].reshape(shape)}


def join(tree):
    """The inverse of `split`."""
    kernel = tree["kernel"]
    return np.concatenate(
        [tree["bias"], np.reshape(kernel, (*kernel.shape[:-2], -1))], axis=-1
    )


def built_optimizer(params, excluded=None, **options):
    """An optimizer of Keras, built, and its variables."""
    variables = [keras.Variable(value, name=name) for name, value in params.items()]
    optimizer = keras.optimizers.RMSprop(**options)
    if excluded:
        optimizer.exclude_from_weight_decay(var_names=excluded)
    optimizer.build(variables)
    return optimizer, variables


@standard_promotion
def run_keras(optimizer, variables, gradients):
    """Trajectories of the parameters and of the optimizer's variables, by name.

    The steps are those of Keras' own training loop on JAX. Afterwards the variables
    have the values of the last step.
    """

    @jax.jit
    def run(carry, gradients):
        def step(carry, gradients):
            carry = optimizer.stateless_apply(carry[1], gradients, carry[0])
            return carry, carry

        return jax.lax.scan(step, carry, gradients)

    everything = (variables, optimizer.variables)
    start = tuple([v.value for v in vs] for vs in everything)
    last, trajectories = run(start, [gradients[v.name] for v in variables])
    for vs, values in zip(everything, last, strict=True):
        for v, value in zip(vs, values, strict=True):
            v.assign(value)
    return [
        {v.name: np.asarray(x) for v, x in zip(vs, xs, strict=True)}
        for vs, xs in zip(everything, trajectories, strict=True)
    ]


@standard_promotion
def run_keras_eagerly(optimizer, variables, gradients):
    """The trajectory of the parameters, step by step, on any backend."""
    trajectory = []
    for t in range(len(gradients["bias"])):
        arrays = [keras.ops.convert_to_tensor(gradients[v.name][t]) for v in variables]
        optimizer.apply(arrays, variables)
        trajectory.append(join({v.name: np.array(v.numpy()) for v in variables}))
    return np.stack(trajectory)


def run_dialect(tx, params, gradients, state=None):
    """Trajectories of the parameters and of the state, and the last of both."""
    history = run(tx, gradients, params, state, "scan")
    trajectories = jax.tree.map(np.asarray, (history.params, history.state))
    return *trajectories, history.last


def path_error(trajectory, expected, start=0.0):
    """Worst difference, relative to the length of the path from ``start``."""
    return relative_error(np.float64(trajectory) - start, np.float64(expected) - start)


def stream_for(steps, options):
    """Gradients on which the options show, and Keras' own rounding does not.

    The centered variant of Keras subtracts, and is compared where the variance is most
    of E[g^2]: the signs of the gradients alternate from step to step, and not from call
    to call.
    """
    if options.get("centered"):
        calls = options.get("gradient_accumulation_steps") or 1
        return np.repeat(alternating_stream(steps, EPSILON), calls, axis=0)[:steps]
    return gradient_stream(steps, EPSILON)
