# SPDX-License-Identifier: Apache-2.0
"""RMSProp in float64 NumPy, slow and plain, and gradients that tell dialects apart.

Written from Hinton's lecture 6e (2012) and Graves (2013, eq. 38-45), without any code
of the library. The centered variance is formed from a float64 mean by definition.
"""

import numpy as np

# The differences between the dialects, apart from default hyperparameters. Names of
# hyperparameters mean the same in each, so that all can be tried on one data set.
DIALECTS = {
    "optax": {"eps_in_sqrt": True, "initial_scale": 0.0, "lr_in_momentum": True},
    "torch": {"eps_in_sqrt": False, "initial_scale": 0.0, "lr_in_momentum": False},
    "tensorflow": {"eps_in_sqrt": True, "initial_scale": 1.0, "lr_in_momentum": True},
    "pfrl": {"eps_in_sqrt": True, "initial_scale": 0.0, "lr_in_momentum": False},
    "stable_baselines3": {
        "eps_in_sqrt": True,
        "initial_scale": 1.0,
        "lr_in_momentum": False,
    },
    "eps_outside_lr_inside": {
        "eps_in_sqrt": False,
        "initial_scale": 0.0,
        "lr_in_momentum": True,
    },
}


def rmsprop(
    gradients,
    learning_rate,
    *,
    decay=0.9,
    eps=1e-8,
    initial_scale=0.0,
    eps_in_sqrt=True,
    centered=False,
    momentum=None,
    nesterov=False,
    bias_correction=False,
    lr_in_momentum=True,
    weight_decay=0.0,
    decoupled=False,
    params=0.0,
):
    """Parameters after every step, of shape (steps, ...), in float64 or complex128.

    ``gradients`` has shape (steps, ...); ``learning_rate`` is a number or one per step.
    ``weight_decay`` is added to the gradient or, ``decoupled``, shrinks the parameters
    by ``learning_rate * weight_decay`` before the step.
    """
    gradients = np.asarray(gradients)
    wide = np.complex128 if np.iscomplexobj(gradients) else np.float64
    gradients = gradients.astype(wide)
    rates = np.broadcast_to(np.asarray(learning_rate, np.float64), len(gradients))
    theta = np.zeros(gradients.shape[1:], wide) + params
    mean, trace = np.zeros_like(theta), np.zeros_like(theta)
    square = np.full(theta.shape, initial_scale, np.float64)
    trajectory = []
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        if decoupled:
            theta = theta * (1 - rate * weight_decay)
        else:
            g = g + weight_decay * theta
        square = decay * square + (1 - decay) * np.abs(g) ** 2
        mean = decay * mean + (1 - decay) * g
        total = 1 - decay**t if bias_correction else 1.0
        x = square / total
        if centered:
            x = np.maximum(x - np.abs(mean / total) ** 2, 0)
        root = np.sqrt(x + eps) if eps_in_sqrt else np.sqrt(x) + eps
        u = np.divide(g, root, out=np.zeros_like(g), where=root != 0)
        if lr_in_momentum:
            u = rate * u
        if momentum is not None:
            trace = momentum * trace + u
            u = u + momentum * trace if nesterov else trace
        theta = theta - (u if lr_in_momentum else rate * u)
        trajectory.append(theta)
    return np.stack(trajectory)


def gradient_stream(steps, eps=1e-8, seed=0):
    """Gradients of shape (steps, 12), float32, on which every dialect shows.

    Columns: 0-2 Gaussian of scale 1, 1e-2, 1e2; 3-5 near sqrt(eps), where its place
    shows; 6 sparse, with exact zeros; 7 zero; 8 a large constant; 9 alternating sign;
    10 falling from 1 to 1e-6; 11 a jump by 1e4 halfway.
    """
    rng = np.random.default_rng(seed)
    root = np.sqrt(eps)
    g = rng.normal(size=(steps, 12))
    g[:, :6] *= [1.0, 1e-2, 1e2, root / 10, root, root * 10]
    g[:, 6] *= rng.random(steps) < 0.2
    g[:, 7] = 0.0
    g[:, 8] = 100.0
    g[:, 9] = np.where(np.arange(steps) % 2, -1.0, 1.0)
    g[:, 10] *= np.logspace(0, -6, steps)
    g[:, 11] *= np.where(np.arange(steps) < steps // 2, 1e-2, 1e2)
    return g.astype(np.float32)


def relative_error(trajectory, expected):
    """Worst difference of two trajectories, relative to the path length.

    The path length is the sum of the sizes of all steps of ``expected``, per element;
    elements that never move must agree exactly.
    """
    path = np.abs(np.diff(expected, axis=0, prepend=0 * expected[:1])).sum(axis=0)
    difference = np.abs(np.asarray(trajectory) - expected)
    # NumPy 1 would round the smallest float64 to the dtype of the path, that is, to 0.
    path = path.astype(np.float64)
    return np.max(difference / np.where(path == 0, np.finfo(np.float64).tiny, path))
