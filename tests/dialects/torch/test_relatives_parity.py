# SPDX-License-Identifier: Apache-2.0
"""The functions for stable-baselines3's and pfrl's classes, against these classes."""

import re

import numpy as np
import pytest
from helpers import frameworks, reference, torch_runs
from helpers.torch_runs import BOUND

from optax_rms.dialects import torch as dialect

torch = frameworks.require("torch")
stable_baselines3 = frameworks.require_submodule(
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like"
)
pfrl = frameworks.require_submodule("pfrl.optimizers.rmsprop_eps_inside_sqrt")
# pfrl calls tensors' methods with a number before the tensors.
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:This overload of"),
]

CLASSES = {
    "stable_baselines3": (stable_baselines3.RMSpropTFLike, dialect.rmsprop_tf_like),
    "pfrl": (pfrl.RMSpropEpsInsideSqrt, dialect.rmsprop_eps_inside_sqrt),
}
OPTIONS = {
    "defaults": {},
    "alpha": {"alpha": 0.9},
    "eps": {"eps": 1e-3},
    "weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "everything": {"alpha": 0.95, "eps": 1e-5, "momentum": 0.8, "centered": True},
}


def gradients_for(options, steps):
    stream = reference.gradient_stream(steps)
    # A constant gradient, whose variance is lost in the difference of two averages.
    return np.delete(stream, 8, axis=1) if options.get("centered") else stream


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_option(name, option, steps):
    if steps == 1000 and option not in ("defaults", "everything"):
        steps = 50
    options = OPTIONS[option]
    error = torch_runs.compare(
        *CLASSES[name],
        options,
        gradients_for(options, steps),
        torch_runs.changing_rates(steps),
        # With decay the gradient depends on the parameter. Away from 0, only slightly.
        start=1.0 if "weight_decay" in options else 0.0,
    )
    assert error <= BOUND


# The dialects of the reference that are the formulas of these functions.
OWN = {
    "stable_baselines3": {"initial_scale": 1.0, "lr_in_momentum": False},
    "pfrl": {"initial_scale": 0.0, "lr_in_momentum": False},
}


@pytest.mark.parametrize("name", CLASSES)
def test_other_dialects_are_rejected(name):
    """On the data of this test, every other dialect is far away."""
    rates, gradients = torch_runs.changing_rates(400), reference.gradient_stream(400)
    tx = CLASSES[name][1](torch_runs.schedule_of(rates), 0.9, 1e-8, momentum=0.9)
    ours, _ = torch_runs.run_jax(tx, np.zeros_like(gradients[0]), gradients)

    def error(placement):
        path = reference.rmsprop(
            gradients, rates, decay=0.9, eps=1e-8, momentum=0.9, **placement
        )
        return reference.relative_error(ours, path)

    others = [
        placement
        for placement in [*reference.DIALECTS.values(), *OWN.values()]
        if {"eps_in_sqrt": True, "initial_scale": 0.0, "lr_in_momentum": True}
        | placement
        != {"eps_in_sqrt": True} | OWN[name]
    ]
    assert error(OWN[name]) <= BOUND
    assert min(map(error, others)) >= 100 * BOUND


def trained(optimizer_class, **options):
    """The state dict after small gradients, for which the place of eps matters."""
    optimizer = torch_runs.make_optimizer(
        optimizer_class, {"p": np.zeros(3, np.float32)}, **options
    )
    torch_runs.run_torch(optimizer, {"p": np.full((4, 3), 1e-5, np.float32)}, [0.1] * 4)
    return optimizer.state_dict()


@pytest.mark.parametrize("name", CLASSES)
def test_without_its_name_the_state_would_be_taken_for_pytorch(name):
    """Keys and settings are the same, and the first step is not."""
    optimizer_class, _ = CLASSES[name]
    state_dict = trained(optimizer_class, alpha=0.0)
    g = {"p": np.full(3, 1e-5, np.float32)}
    steps = []
    for optimizer in (None, optimizer_class.__name__):
        tx, state = dialect.import_state(state_dict, dict, optimizer=optimizer)
        steps.append(tx.update(g, state)[0]["p"])
    assert np.all(abs(steps[0] / steps[1] - 1) > 0.1)


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_without_state_start_as_in_the_class(name):
    optimizer_class, make = CLASSES[name]
    params = {"p": np.zeros(3, np.float32)}
    optimizer = torch_runs.make_optimizer(optimizer_class, params)
    named = dict(zip(params, optimizer.param_groups[0]["params"], strict=True))
    _, state = dialect.import_state(
        optimizer.state_dict(), dict, named, optimizer=optimizer_class.__name__
    )
    np.testing.assert_array_equal(state[0].nu["p"], make().init(params)[0].nu["p"])
    exported = dialect.export_state(
        state,
        dict,
        named,
        like=optimizer.state_dict(),
        optimizer=optimizer_class.__name__,
    )
    assert exported["state"] == {}


def test_a_shared_optimizer_of_pfrl():
    """Its constructor makes the state, at step 0."""
    optimizer = torch_runs.make_optimizer(
        pfrl.SharedRMSpropEpsInsideSqrt, {"p": np.zeros(3, np.float32)}, momentum=0.9
    )
    state_dict = optimizer.state_dict()
    _, state = dialect.import_state(state_dict, dict, optimizer="RMSpropEpsInsideSqrt")
    exported = dialect.export_state(
        state, dict, like=state_dict, optimizer="RMSpropEpsInsideSqrt"
    )
    assert exported["state"].keys() == {0}
    assert exported["state"][0]["step"] == 0


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("RMSProp", "optimizer must be one of RMSprop, RMSpropTF, RMSpropTFLike"),
        ("RMSpropTF", "'RMSpropTF', but param_groups lack 'lr_in_momentum'"),
    ],
)
def test_other_names_are_refused(optimizer, message):
    state_dict = trained(torch.optim.RMSprop)
    with pytest.raises(ValueError, match=re.escape(message)):
        dialect.import_state(state_dict, dict, optimizer=optimizer)
