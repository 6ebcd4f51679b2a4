# SPDX-License-Identifier: Apache-2.0
"""Runs handed over from Keras and back to it."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.keras_runs import (
    BOUND,
    built_optimizer,
    join,
    keras,
    path_error,
    run_dialect,
    run_keras,
    run_keras_eagerly,
    split,
    standard_promotion,
    stream_for,
)

from optax_rms.dialects import keras as dialect

pytestmark = [
    pytest.mark.parity,
    # Raised within Keras by its variables' method numpy().
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def convert(arrays):
    """To a tree with other names, in another order, transposed."""
    return {
        "layer": {"weight": jnp.asarray(arrays["kernel"]).T},
        "shift": jnp.asarray(arrays["bias"]),
    }


def convert_back(params):
    return {"bias": params["shift"], "kernel": params["layer"]["weight"].T}


HANDED_OVER = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"momentum": 0.9, "centered": True},
    "ema": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 10},
    "accumulation": {"momentum": 0.9, "gradient_accumulation_steps": 4},
    "schedule": {
        "learning_rate": keras.optimizers.schedules.CosineDecay(0.01, 60),
        "momentum": 0.5,
    },
    "decay": {"learning_rate": 0.02, "weight_decay": 0.5, "clipnorm": 1.0},
}


def train(optimizer, variables, gradients):
    """The trajectory of the parameters in Keras."""
    if keras.backend.backend() != "jax":
        return run_keras_eagerly(optimizer, variables, gradients)
    return join(run_keras(optimizer, variables, gradients)[0])


def hand_over_and_back(options, keras_steps=25, steps=25):
    """The error of a run in Keras, JAX and Keras again, beside one in Keras alone."""
    total = 2 * keras_steps + steps
    stream = stream_for(total, options)
    # Only decay needs something to begin with, and what stays at 0 does so exactly.
    start = 1.0 if "weight_decay" in options else 0.0
    params, gradients = split(np.full(stream.shape[1], start, "f")), split(stream)

    def part(start, stop):
        return {name: g[start:stop] for name, g in gradients.items()}

    expected = train(*built_optimizer(params, **options), gradients)
    first, variables = built_optimizer(params, **options)
    legs = [train(first, variables, part(0, keras_steps))]
    tx, state = dialect.import_state(first, convert)
    weights = convert({v.name: v.numpy() for v in variables})
    middle = [
        convert(dict(zip(gradients, leaves, strict=True)))
        for leaves in zip(*part(keras_steps, keras_steps + steps).values(), strict=True)
    ]
    middle = jax.tree.map(lambda *leaves: np.stack(leaves), *middle)
    trajectory, _, (weights, state) = run_dialect(tx, weights, middle, state)
    kernel = np.swapaxes(trajectory["layer"]["weight"], 1, 2)
    legs.append(join({"bias": trajectory["shift"], "kernel": kernel}))

    weights = {name: np.asarray(w) for name, w in convert_back(weights).items()}
    last, variables = built_optimizer(weights, **options)
    last.load_own_variables(dialect.export_state(state, convert_back, like=last))
    legs.append(train(last, variables, part(total - keras_steps, total)))
    return path_error(np.concatenate(legs), expected, start)


@pytest.mark.parametrize("options", HANDED_OVER.values(), ids=HANDED_OVER)
def test_hand_over_and_back(options):
    error = hand_over_and_back(options)
    assert error <= BOUND


def test_hand_over_from_another_backend():
    """Keras on PyTorch: its arrays are read, and its schedule is traced by JAX."""
    code = (
        "import test_keras_handover_parity as t\n"
        "assert t.keras.backend.backend() == 'torch'\n"
        "options = {**t.HANDED_OVER['schedule'], **t.HANDED_OVER['accumulation']}\n"
        "print(t.hand_over_and_back(options))"
    )
    here = pathlib.Path(__file__).parent
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={
            **os.environ,
            "KERAS_BACKEND": "torch",
            "PYTHONPATH": os.pathsep.join(map(str, (here, here.parents[1], *sys.path))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert printed.returncode == 0, printed.stderr
    assert float(printed.stdout.splitlines()[-1]) <= BOUND


def test_a_loss_scale_continues():
    """Steps that Keras skips, as a gradient is infinite, are not counted."""
    stream = stream_for(50, {})
    params, gradients = split(np.zeros(stream.shape[1], "f")), split(stream)
    inner = keras.optimizers.RMSprop(HANDED_OVER["schedule"]["learning_rate"])
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    variables = [keras.Variable(x, name=name) for name, x in params.items()]
    optimizer.build(variables)
    apply = standard_promotion(jax.jit(optimizer.stateless_apply))
    everything = (variables, optimizer.variables)
    values = tuple([v.value for v in vs] for vs in everything)
    trajectory = []
    for t in range(50):
        scale = 8.0 if t < 10 else 4.0
        if t == 10:
            skipped = [jnp.full(v.shape, jnp.inf) for v in variables]
            values = apply(values[1], skipped, values[0])
        if t == 25:
            for vs, own in zip(everything, values, strict=True):
                for v, value in zip(vs, own, strict=True):
                    v.assign(value)
            tx, state = dialect.import_state(optimizer, convert)
            weights = convert({v.name: np.array(v) for v in variables})
        scaled = [scale * gradients[v.name][t] for v in variables]
        values = apply(values[1], scaled, values[0])
        named = zip(variables, values[0], strict=True)
        trajectory.append(join({v.name: np.array(x) for v, x in named}))
    assert optimizer.dynamic_scale.numpy() == 4
    assert state.count == 25
    steps = [
        convert({name: g[t] for name, g in gradients.items()}) for t in range(25, 50)
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *steps)
    ours, _, _ = run_dialect(tx, weights, stacked, state)
    kernel = np.swapaxes(ours["layer"]["weight"], 1, 2)
    actual = join({"bias": ours["shift"], "kernel": kernel})
    expected, start = np.stack(trajectory[25:]), trajectory[24]
    assert path_error(actual - start, expected - start) <= BOUND
