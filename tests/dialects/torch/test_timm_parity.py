# SPDX-License-Identifier: Apache-2.0
"""`dialects.torch.rmsprop_tf` against timm's ``RMSpropTF``, step for step."""

import numpy as np
import pytest
from helpers import frameworks, reference, torch_runs
from helpers.torch_runs import BOUND
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from optax_rms.dialects import torch as dialect

frameworks.require("torch")
timm = frameworks.require_submodule("timm.optim.rmsprop_tf")
pytestmark = pytest.mark.parity

# In the tests of decoupled decay the parameters start from 0, as timm rounds
# 1 - lr * decay to float32, which is a share of 1e-4 of a decay of 1e-3. A coupled
# decay, on which the gradient depends, is compared away from 0, where that is little.
HIGHEST_RATE = 2e-3
CORRECTED = {
    "weight_decay": 5.0,
    "decoupled_decay": True,
    "corrected_weight_decay": True,
    "lr": HIGHEST_RATE,
}
OPTIONS = {
    "defaults": {},
    "alpha": {"alpha": 0.99},
    "eps": {"eps": 1e-3},
    "weight decay": {"weight_decay": 0.1},
    "decoupled decay": {"weight_decay": 5.0, "decoupled_decay": True},
    "corrected decay": CORRECTED,
    "momentum": {"momentum": 0.9},
    "rate after momentum": {"momentum": 0.9, "lr_in_momentum": False},
    "centered": {"centered": True},
    "caution": {"momentum": 0.9, "caution": True},
    "caution without momentum": {"caution": True},
    "everything": {
        "alpha": 0.95,
        "eps": 1e-5,
        "momentum": 0.8,
        "centered": True,
        "lr_in_momentum": False,
        "caution": True,
        **CORRECTED,
    },
}


def rmsprop_tf(lr, **options):
    """The dialect. Of a schedule it has to be told what timm takes from the number."""
    if options.get("corrected_weight_decay"):
        options["max_lr_snapshot"] = HIGHEST_RATE
    return dialect.rmsprop_tf(lr, **options)


def compare(options, gradients):
    is_coupled = options.get("weight_decay") and not options.get("decoupled_decay")
    if options.get("centered"):
        # A constant, whose variance timm loses in the difference of two averages. The
        # small ones vary less than a weight decay of the parameters.
        gradients = gradients[:, [0, 2, 9] if is_coupled else [*range(8), 9, 10, 11]]
    return torch_runs.compare(
        timm.RMSpropTF,
        rmsprop_tf,
        {"lr_in_momentum": True} | options,
        gradients,
        torch_runs.changing_rates(len(gradients)),
        start=1.0 if is_coupled else 0.0,
    )


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 100) for name in OPTIONS]
    + [(name, 1000) for name in ("defaults", "momentum", "centered", "everything")],
)
def test_every_option(name, steps):
    assert compare(OPTIONS[name], reference.gradient_stream(steps, 1e-10)) <= BOUND


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
            "momentum": st.floats(0.1, 0.95),
            "centered": st.booleans(),
            "lr_in_momentum": st.booleans(),
            "caution": st.booleans(),
        },
    ),
    decay=st.sampled_from([{}, {"weight_decay": 0.05}, CORRECTED]),
    seed=st.integers(0, 99),
)
def test_random_options(options, decay, seed):
    assert compare(options | decay, reference.gradient_stream(60, 1e-8, seed)) <= BOUND


def test_caution_enlarges_steps_at_most_a_thousandfold():
    """Of 4,000 elements, in the second step all but one go against their momentum."""
    gradients = np.ones((2, 4000), np.float32)
    gradients[1, 1:] = -1e-3
    assert compare({"momentum": 0.9, "caution": True}, gradients) <= BOUND


@pytest.mark.parametrize("lr_in_momentum", [True, False])
def test_other_dialects_are_rejected(lr_in_momentum):
    """On the data of this test, every other dialect is far from timm's."""
    # So many steps that the 1 from which the averages start has faded below eps.
    rates, gradients = torch_runs.changing_rates(400), reference.gradient_stream(400)
    tx = rmsprop_tf(
        torch_runs.schedule_of(rates),
        eps=1e-8,
        momentum=0.9,
        lr_in_momentum=lr_in_momentum,
    )
    ours, _ = torch_runs.run_jax(tx, np.zeros_like(gradients[0]), gradients)
    outside = {"eps_in_sqrt": False, "initial_scale": 1.0}
    dialects = reference.DIALECTS | {
        "eps outside": outside | {"lr_in_momentum": lr_in_momentum}
    }
    errors = {
        name: reference.relative_error(
            ours, reference.rmsprop(gradients, rates, momentum=0.9, **placement)
        )
        for name, placement in dialects.items()
    }
    own = "tensorflow" if lr_in_momentum else "stable_baselines3"
    assert errors.pop(own) <= BOUND
    assert min(errors.values()) >= 100 * BOUND, errors


@pytest.mark.parametrize(
    "name", ["weight decay", "decoupled decay", "corrected decay", "caution"]
)
def test_every_option_matters(name):
    """Without it, and with another decay than it, the path is far away."""
    gradients = reference.gradient_stream(100)
    start, rates = np.ones_like(gradients[0]), torch_runs.changing_rates(100)

    def run(options):
        tx = rmsprop_tf(**options | {"lr": torch_runs.schedule_of(rates)})
        return torch_runs.run_jax(tx, start, gradients)[0]

    expected = run(OPTIONS[name]).astype(np.float64)
    for other in OPTIONS.values():
        if "weight_decay" in other or not other:
            error = torch_runs.relative_error(run(other), expected, start)
            assert (error >= 100 * BOUND) == (other != OPTIONS[name])
