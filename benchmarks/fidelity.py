# SPDX-License-Identifier: Apache-2.0
"""How far a run drifts when it moves from another framework to JAX.

    python -m benchmarks.fidelity

The gradients are those of the digits network along one training run: 300 batches of
32, all 9,610 weights. Each framework's own RMSProp follows them, with its defaults but
momentum 0.9 and a cosine learning rate; then `optax.rmsprop` with the same numbers;
then the dialect of this library. The drift is the distance between the end points over
the distance that the framework's run covered.

Centered RMSProp is measured on 1,000 constant gradients between 0.1 and 1000, decay
0.9, epsilon 1e-8, 400 steps: the count of weights that are NaN at the end.
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
from tests.frameworks import require_submodule

import optax_rms
from benchmarks import record

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
    def step(carry, gradient):
        weights, state = carry
        updates, state = tx.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    weights = jnp.zeros(gradients.shape[1])
    # One compiled call per step: within a scan XLA contracts the centered difference to
    # fused multiply-adds, which a training loop does not see.
    step = jax.jit(step)
    carry = (weights, tx.init(weights))
    for gradient in gradients:
        carry, _ = step(carry, gradient)
    return np.asarray(carry[0])


def run_torch(make, learning_rates, gradients) -> np.ndarray:
    weights = torch.zeros(gradients.shape[1], requires_grad=True)
    optimizer = make([weights])
    for rate, gradient in zip(learning_rates, gradients, strict=True):
        optimizer.param_groups[0]["lr"] = float(rate)
        weights.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    return weights.detach().numpy()


def run_keras(learning_rates, gradients, **settings) -> np.ndarray:
    weights = keras.Variable(np.zeros(gradients.shape[1], np.float32))
    optimizer = keras.optimizers.RMSprop(**settings)
    optimizer.build([weights])
    for rate, gradient in zip(learning_rates, gradients, strict=True):
        optimizer.learning_rate = float(rate)
        optimizer.apply([jnp.asarray(gradient)])
    return np.asarray(weights.value)


def drift() -> list[dict[str, object]]:
    gradients = digits_gradients()
    timm = require_submodule("timm.optim.rmsprop_tf").RMSpropTF

    def row(name, theirs, with_optax, with_dialect):
        def distance(tx):
            apart = np.linalg.norm(run_jax(tx, gradients) - theirs)
            return float(apart / np.linalg.norm(theirs))

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


def centered_nan() -> dict[str, int]:
    constant = np.tile(np.logspace(-1, 3, 1000, dtype=np.float32), (400, 1))
    rates = [1e-3] * len(constant)
    ends = {
        "optax.rmsprop": run_jax(optax.rmsprop(1e-3, centered=True), constant),
        "torch.optim.RMSprop": run_torch(
            lambda w: torch.optim.RMSprop(w, alpha=0.9, eps=1e-8, centered=True),
            rates,
            constant,
        ),
        "keras.optimizers.RMSprop": run_keras(
            rates, constant, rho=0.9, epsilon=1e-8, centered=True
        ),
        "optax_rms.rmsprop": run_jax(optax_rms.rmsprop(1e-3, centered=True), constant),
    }
    return {name: int(np.isnan(end).sum()) for name, end in ends.items()}


def measure(quick: bool = False, progress: Any = iter) -> dict[str, Any]:
    """All of it, which takes seconds, whether ``quick`` or not."""
    del quick
    parts = {"drift": drift, "centered_nan": centered_nan}
    return {name: parts[name]() for name in progress(parts)}


if __name__ == "__main__":
    measured = measure()
    print(measured)
    print(record.save("fidelity", measured))
