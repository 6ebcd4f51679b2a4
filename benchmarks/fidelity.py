# SPDX-License-Identifier: Apache-2.0
"""Drift of a run that moves from another framework to JAX, and of centered RMSProp.

    python -m benchmarks.fidelity

The gradients of the first table are recorded along one training run of the digits
network: 300 batches of 32 images, all 9,610 weights. Each framework's own RMSProp
follows these gradients with the framework's defaults, except momentum 0.9 and a cosine
learning rate. Then `optax.rmsprop` follows them with the same numbers, and then the
dialect of this library. The drift is the distance between the two end points, divided
by the distance between start and end of the framework's run.

The gradients of the second table are constant: 1,000 weights, one gradient each,
logarithmically spaced from 0.1 to 1000. Centered RMSProp takes 400 steps with decay
0.9. The table has the number of weights that are NaN at the end, and the longest finite
step of any weight, as a multiple of the learning rate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
from flax import linen as nn
from sklearn.datasets import load_digits

import optax_rms
from benchmarks import record
from tests.helpers.frameworks import require_submodule

STEPS = 300
MOMENTUM = 0.9


def digits_gradients() -> np.ndarray:
    """Gradients of all weights, flattened, along a run: float32 [steps, 9610]."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    network = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(10)])
    params = network.init(jax.random.key(0), images[:1])
    tx = optax_rms.rmsprop(1e-3)

    def loss(params, batch):
        logits = network.apply(params, images[batch])
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, labels[batch]
        ).mean()

    def step(carry, key):
        params, state = carry
        batch = jax.random.choice(key, len(labels), (32,), replace=False)
        gradients = jax.grad(loss)(params, batch)
        updates, state = tx.update(gradients, state)
        flat = jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradients)])
        return (optax.apply_updates(params, updates), state), flat

    keys = jax.random.split(jax.random.key(1), STEPS)
    return np.asarray(jax.lax.scan(step, (params, tx.init(params)), keys)[1])


def run_jax(tx: optax.GradientTransformation, gradients: np.ndarray) -> np.ndarray:
    """Weights after each step: float32 [steps, weights]; all start from 0."""

    def step(carry, gradient):
        weights, state = carry
        updates, state = tx.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    weights = jnp.zeros(gradients.shape[1])
    # One compiled call per step, as in a training loop. Within a scan XLA contracts the
    # centered difference to fused multiply-adds, which round differently.
    step = jax.jit(step)
    carry = (weights, tx.init(weights))
    path = []
    for gradient in gradients:
        carry, _ = step(carry, gradient)
        path.append(np.asarray(carry[0]))
    return np.stack(path)


def run_torch(make, learning_rates, gradients) -> np.ndarray:
    weights = torch.zeros(gradients.shape[1], requires_grad=True)
    optimizer = make([weights])
    path = []
    for rate, gradient in zip(learning_rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        weights.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        path.append(weights.detach().numpy().copy())
    return np.stack(path)


def run_keras(learning_rates, gradients, **settings) -> np.ndarray:
    weights = keras.Variable(np.zeros(gradients.shape[1], np.float32))
    optimizer = keras.optimizers.RMSprop(**settings)
    optimizer.build([weights])
    path = []
    for rate, gradient in zip(learning_rates, gradients, strict=True):
        optimizer.learning_rate = float(rate)
        optimizer.apply([jnp.asarray(gradient)])
        path.append(np.array(weights.value))
    return np.stack(path)


def drift() -> list[dict[str, object]]:
    gradients = digits_gradients()
    timm = require_submodule("timm.optim.rmsprop_tf").RMSpropTF

    def row(name, theirs, with_optax, with_dialect):
        end = theirs[-1]

        def distance(tx):
            apart = np.linalg.norm(run_jax(tx, gradients)[-1] - end)
            return float(apart / np.linalg.norm(end))

        found = {"optax": distance(with_optax), "dialect": distance(with_dialect)}
        return {"framework": name, **found}

    def torch_run(optimizer):
        rates = map(fast, range(STEPS))
        return run_torch(lambda w: optimizer(w, momentum=MOMENTUM), rates, gradients)

    slow = optax.cosine_decay_schedule(1e-3, STEPS)
    fast = optax.cosine_decay_schedule(1e-2, STEPS)
    return [
        row(
            "torch.optim.RMSprop",
            torch_run(torch.optim.RMSprop),
            optax.rmsprop(fast, decay=0.99, eps=1e-8, momentum=MOMENTUM),
            optax_rms.dialects.torch.rmsprop(fast, momentum=MOMENTUM),
        ),
        row(
            "timm RMSpropTF",
            torch_run(timm),
            optax.rmsprop(fast, decay=0.9, eps=1e-10, momentum=MOMENTUM),
            optax_rms.dialects.torch.rmsprop_tf(fast, momentum=MOMENTUM),
        ),
        row(
            "keras.optimizers.RMSprop",
            run_keras(map(slow, range(STEPS)), gradients, momentum=MOMENTUM),
            optax.rmsprop(slow, decay=0.9, eps=1e-7, momentum=MOMENTUM),
            optax_rms.dialects.keras.rmsprop(slow, momentum=MOMENTUM),
        ),
    ]


def centered() -> list[dict[str, object]]:
    gradients = np.tile(np.logspace(-1, 3, 1000, dtype=np.float32), (400, 1))
    rate, decay = 1e-3, 0.9
    rates = [rate] * len(gradients)

    def torch_run(eps):
        def make(weights):
            return torch.optim.RMSprop(weights, alpha=decay, eps=eps, centered=True)

        return run_torch(make, rates, gradients)

    def keras_run(eps):
        settings = {"rho": decay, "epsilon": eps, "centered": True}
        return run_keras(rates, gradients, **settings)

    def jax_run(library, eps, centered=True):
        tx = library.rmsprop(rate, decay=decay, eps=eps, centered=centered)
        return run_jax(tx, gradients)

    def row(name, eps, path, is_centered=True):
        steps = np.diff(path.astype(np.float64), axis=0, prepend=0)
        longest = np.max(np.abs(steps), where=np.isfinite(steps), initial=0)
        return {
            "optimizer": name,
            "centered": is_centered,
            "eps": eps,
            "nan_weights": int(np.isnan(path[-1]).sum()),
            "longest_step": float(longest / rate),
        }

    small, large = 1e-8, 1e-2
    return [
        row("optax.rmsprop", small, jax_run(optax, small)),
        row("torch.optim.RMSprop", small, torch_run(small)),
        row("keras.optimizers.RMSprop", small, keras_run(small)),
        row("optax_rms.rmsprop", small, jax_run(optax_rms, small)),
        row("optax_rms.rmsprop", large, jax_run(optax_rms, large)),
        row("optax_rms.rmsprop", small, jax_run(optax_rms, small, False), False),
    ]


def measure(quick: bool = False, progress: Any = iter) -> dict[str, Any]:
    """Both tables; they take seconds, whether ``quick`` or not."""
    del quick
    parts = {"drift": drift, "centered": centered}
    return {name: parts[name]() for name in progress(parts)}


if __name__ == "__main__":
    measured = measure()
    print(measured)
    print(record.save("fidelity", measured))
