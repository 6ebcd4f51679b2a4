# SPDX-License-Identifier: Apache-2.0
"""The same run in PyTorch and in JAX: given gradients, a learning rate per step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import frameworks, reference, running

# The worst difference that counts as agreement, relative to the length of the path.
BOUND = 2e-5
TINY = float(np.finfo(np.float32).tiny)


def make_optimizer(optimizer_class, params, **settings):
    """An optimizer of copies of ``{name: array}``, whose state dict has the names."""
    torch = frameworks.require("torch")
    named = [(name, torch.nn.Parameter(torch.tensor(p))) for name, p in params.items()]
    return optimizer_class(named, **settings)


def run_torch(optimizer, gradients, rates):
    """The parameters after every step, of shape (steps, ...), by name.

    ``gradients`` are by name, of shape (steps, ...); ``rates`` are one per step.
    """
    torch = frameworks.require("torch")
    params = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    trajectory = {name: [] for name in params}
    for t, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        for name, p in params.items():
            p.grad = torch.tensor(gradients[name][t])
        optimizer.step()
        for name, p in params.items():
            trajectory[name].append(p.detach().numpy().copy())
    return {name: np.stack(steps) for name, steps in trajectory.items()}


def run_jax(tx, params, gradients, state=None):
    """The parameters after every step, as in `run_torch`, and the last state."""
    history = running.run(tx, gradients, params, state, "scan")
    return jax.tree.map(np.asarray, history.params), history.last[1]


def compare(optimizer_class, dialect, options, gradients, rates, start=0.0):
    """Run one array in both, compare the states, and return the worst difference.

    The difference is that of the parameters, relative to the length of their paths.
    """
    start = np.full(gradients.shape[1:], start, gradients.dtype)
    optimizer = make_optimizer(optimizer_class, {"p": start}, **options)
    expected = run_torch(optimizer, {"p": gradients}, rates)["p"]
    tx = dialect(**{**options, "lr": schedule_of(rates)})
    actual, state = run_jax(tx, start, gradients)
    compare_states(state, optimizer, options)
    return relative_error(actual, expected, start)


def relative_error(actual, expected, start):
    """`reference.relative_error` of paths that do not start from 0."""
    wide = np.promote_types(actual.dtype, np.float64)
    return reference.relative_error(
        actual.astype(wide) - start, expected.astype(wide) - start
    )


def compare_states(state, optimizer, options):
    """Compare every slot with its own scale: the root mean square for the mean."""
    state = jax.tree.map(np.asarray, state)
    (stored,) = optimizer.state_dict()["state"].values()
    slots = {slot: np.asarray(array) for slot, array in stored.items()}
    square, mean = slots["square_avg"], slots.get("grad_avg", 0.0)
    if options.get("centered"):
        np.testing.assert_array_less(
            abs(state[0].mu - mean), BOUND * square**0.5 + TINY
        )
        ours = state[0].variance + np.square(state[0].mu)
    else:
        ours = state[0].nu
    np.testing.assert_array_less(abs(ours - square), BOUND * square + TINY)
    counts_first = options.get("lr_in_momentum", False)
    trace, schedule = (state[2], state[1]) if counts_first else (state[1], state[2])
    assert schedule.count == slots["step"]
    if options.get("momentum"):
        buffer = slots["momentum_buffer"] * (-1 if counts_first else 1)
        scale = float(np.max(abs(buffer), initial=TINY))
        np.testing.assert_allclose(trace.trace, buffer, rtol=0, atol=BOUND * scale)
    else:
        assert trace == optax.EmptyState()


def schedule_of(rates):
    """The schedule of these learning rates."""
    rates = jnp.asarray(rates)
    return lambda count: rates[count]


def changing_rates(steps):
    """Learning rates that change at every step, over a decade."""
    return 1e-3 * np.logspace(0, -1, 7, dtype=np.float32)[np.arange(steps) % 7]
