# SPDX-License-Identifier: Apache-2.0
"""`dialects.torch.rmsprop` against ``torch.optim.RMSprop``, step for step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import frameworks, reference, torch_runs, trajectory
from helpers.torch_runs import BOUND
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import optax_rms
from optax_rms.dialects import torch as dialect

torch = frameworks.require("torch")
pytestmark = pytest.mark.parity
compare = functools.partial(torch_runs.compare, torch.optim.RMSprop, dialect.rmsprop)

OPTIONS = {
    "defaults": {},
    "alpha": {"alpha": 0.9},
    "alpha zero": {"alpha": 0.0},
    "eps": {"eps": 1e-3},
    "weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "maximize": {"maximize": True},
    "everything": {
        "alpha": 0.95,
        "eps": 1e-5,
        "weight_decay": 1e-2,
        "momentum": 0.8,
        "centered": True,
        "maximize": True,
    },
}


def stream_for(options, steps, seed=0):
    """Gradients whose variance PyTorch can tell, where it has to.

    Centered, PyTorch subtracts the squared mean from the mean square, which leaves
    rounding errors only where the gradient, or the weight decay in it, hardly changes.
    """
    stream = reference.gradient_stream(steps, seed=seed)
    if options.get("centered"):
        loud = [0, 2, 9] if options.get("weight_decay") else [*range(8), 9, 10, 11]
        return stream[:, loud]
    return stream


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 100) for name in OPTIONS]
    + [(name, 1000) for name in ("defaults", "momentum", "centered", "everything")],
)
def test_every_option(name, steps):
    options = OPTIONS[name]
    # With decay the gradient depends on the parameter. Away from 0, only slightly so.
    start = 1.0 if "weight_decay" in options else 0.0
    rates = torch_runs.changing_rates(steps)
    assert compare(options, stream_for(options, steps), rates, start) <= BOUND


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    # To shrink a failure takes minutes, and any example says enough.
    phases=[Phase.explicit, Phase.generate],
)
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "alpha": st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]),
            "eps": st.sampled_from([1e-10, 1e-8, 1e-5, 1e-2, 1.0]),
            "weight_decay": st.floats(1e-5, 0.1),
            "momentum": st.floats(0.1, 0.95),
            "centered": st.booleans(),
            "maximize": st.booleans(),
        },
    ),
    seed=st.integers(0, 99),
)
def test_random_options(options, seed):
    gradients = stream_for(options, 60, seed)
    assert compare(options, gradients, torch_runs.changing_rates(60), 1.0) <= BOUND


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("centered", [False, True])
def test_other_dialects_are_rejected(centered, momentum):
    """On the data of this test, every other dialect is far from PyTorch."""
    rates = torch_runs.changing_rates(100)
    stream = trajectory.alternating_stream if centered else reference.gradient_stream
    gradients = stream(100)
    shared = {"centered": centered, "momentum": momentum}
    tx = dialect.rmsprop(
        torch_runs.schedule_of(rates), 0.9, 1e-8, 0, momentum or 0, centered
    )
    ours, _ = torch_runs.run_jax(tx, np.zeros_like(gradients[0]), gradients)
    errors = {
        name: reference.relative_error(
            ours,
            reference.rmsprop(
                gradients, rates, decay=0.9, eps=1e-8, **shared, **placement
            ),
        )
        for name, placement in reference.DIALECTS.items()
    }
    if momentum is None:  # Without momentum, this is the same formula.
        assert errors.pop("eps_outside_lr_inside") <= BOUND
    assert errors.pop("torch") <= BOUND
    assert min(errors.values()) >= 100 * BOUND, errors


@pytest.mark.parametrize("other", [{"weight_decay": 0.0}, {"decoupled": True}])
def test_other_weight_decay_is_rejected(other):
    rates, gradients = torch_runs.changing_rates(100), reference.gradient_stream(100)
    tx = dialect.rmsprop(torch_runs.schedule_of(rates), weight_decay=0.1)
    ours, _ = torch_runs.run_jax(tx, np.ones_like(gradients[0]), gradients)
    torch_like = {"decay": 0.99, "params": 1.0, "weight_decay": 0.1}
    torch_like |= reference.DIALECTS["torch"]

    def error(**options):
        expected = reference.rmsprop(gradients, rates, **torch_like | options)
        return torch_runs.relative_error(ours, expected, 1.0)

    assert error() <= BOUND
    assert error(**other) >= 100 * BOUND


def test_complex_parameters_have_averages_for_both_parts():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(200, 5, 2)) * [1.0, 1e-2]
    gradients = (parts @ [1, 1j]).astype(np.complex64)
    start, rates = np.full(5, 1 + 2j, np.complex64), torch_runs.changing_rates(200)
    options = {"weight_decay": 0.01, "momentum": 0.9, "centered": True}
    optimizer = torch_runs.make_optimizer(torch.optim.RMSprop, {"p": start}, **options)
    expected = torch_runs.run_torch(optimizer, {"p": gradients}, rates)["p"]
    tx = dialect.rmsprop(torch_runs.schedule_of(rates), **options)
    actual, _ = torch_runs.run_jax(tx, start, gradients)
    assert torch_runs.relative_error(actual, expected, start) <= BOUND

    shared = optax.chain(
        optax.add_decayed_weights(0.01),
        optax_rms.rmsprop(
            torch_runs.schedule_of(rates),
            0.99,
            eps_in_sqrt=False,
            centered=True,
            momentum=0.9,
            lr_in_momentum=False,
        ),
    )
    actual, _ = torch_runs.run_jax(shared, start, gradients)
    assert torch_runs.relative_error(actual, expected, start) >= 100 * BOUND


def test_gradients_of_complex_parameters_are_conjugated():
    """What the docstring says about ``jax.grad``: its conjugate is PyTorch's."""
    z = np.complex64(0.5 - 2j)
    p = torch.nn.Parameter(torch.tensor(z))
    (p * (1 + 1j)).real.backward()
    g = jax.grad(lambda z: jnp.real(z * jnp.complex64(1 + 1j)))(z)
    assert jnp.conj(g) == p.grad.numpy()


def test_none_leaves_a_parameter_alone():
    """No decay, no step of the momentum, no change of the averages."""
    rng = np.random.default_rng(0)
    start = {"a": np.ones(3, np.float32), "z": np.full(2, 1 + 1j, np.complex64)}
    options = {"weight_decay": 0.1, "momentum": 0.9, "centered": True}
    optimizer = torch_runs.make_optimizer(torch.optim.RMSprop, start, **options)
    tensors = dict(zip(start, optimizer.param_groups[0]["params"], strict=True))
    tx = dialect.rmsprop(**options)
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    for t in range(12):
        gradients = {
            name: None if (t + i) % 3 == 0 else rng.normal(size=p.shape).astype(p.dtype)
            for i, (name, p) in enumerate(start.items())
        }
        before = params
        for name, g in gradients.items():
            tensors[name].grad = None if g is None else torch.tensor(g)
        optimizer.step()
        updates, state = tx.update(jax.tree.map(jnp.asarray, gradients), state, params)
        params = {
            name: p if updates[name] is None else p + updates[name]
            for name, p in params.items()
        }
        for name, g in gradients.items():
            # Relative to parameters of order 1, of which each step rounds a few times.
            np.testing.assert_allclose(
                params[name], tensors[name].detach(), rtol=0, atol=12 * 4 * 1.2e-7
            )
            assert (g is None) == np.array_equal(params[name], before[name])


def test_float64():
    steps = 100
    gradients = reference.gradient_stream(steps).astype(np.float64)
    with trajectory.x64():
        error = compare({"momentum": 0.9}, gradients, torch_runs.changing_rates(steps))
    # 2e-5 is some 170 roundings in float32; as many in float64 are:
    assert error <= BOUND * np.finfo(np.float64).eps / np.finfo(np.float32).eps


def test_constant_gradients_turn_pytorch_to_nan_and_leave_this_finite():
    """Centered, on gradients that hardly change, as the docstring says."""
    gradients = np.tile(np.logspace(-1, 3, 1000, dtype=np.float32), (400, 1))
    options = {"alpha": 0.9, "centered": True}
    optimizer = torch_runs.make_optimizer(
        torch.optim.RMSprop, {"p": gradients[0]}, **options
    )
    rates = np.full(400, 1e-5)
    theirs = torch_runs.run_torch(optimizer, {"p": gradients}, rates)["p"]
    ours, _ = torch_runs.run_jax(
        dialect.rmsprop(1e-5, **options), gradients[0], gradients
    )
    assert np.isnan(theirs[-1]).sum() > 100
    assert np.isfinite(ours).all()


@pytest.mark.parametrize(
    ("dtype", "eps"), [(np.float32, 0.0), (np.float16, 1e-8)], ids=str
)
def test_zero_gradients_turn_pytorch_to_nan_and_leave_this_alone(dtype, eps):
    """Where eps is 0, or rounds to 0 in float16, PyTorch divides 0 by 0."""
    start, gradients = np.ones(2, dtype), np.zeros((3, 2), dtype)
    optimizer = torch_runs.make_optimizer(torch.optim.RMSprop, {"p": start}, eps=eps)
    theirs = torch_runs.run_torch(optimizer, {"p": gradients}, [0.1] * 3)["p"]
    ours, _ = torch_runs.run_jax(dialect.rmsprop(0.1, eps=eps), start, gradients)
    assert np.isnan(theirs).all()
    np.testing.assert_array_equal(ours, 1)
