# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' ``RMSprop`` against the settings in docs/other_frameworks.md."""

import numpy as np
import optax
import pytest
from helpers import frameworks, reference, torch_runs
from helpers.torch_runs import BOUND

import optax_rms

torch = frameworks.require("torch")
bitsandbytes = frameworks.require("bitsandbytes")
pytestmark = pytest.mark.parity

GRADIENTS = reference.gradient_stream(100)
RATES = torch_runs.changing_rates(len(GRADIENTS))
START = np.ones_like(GRADIENTS[0])


def run_theirs(**options):
    """The parameters after every step, and the last mean square."""
    param = torch.nn.Parameter(torch.tensor(START))
    optimizer = bitsandbytes.optim.RMSprop([param], **options)
    optimizer.param_groups[0]["param_names"] = ["p"]
    path = torch_runs.run_torch(optimizer, {"p": GRADIENTS}, RATES)["p"]
    return path, optimizer.state[param]["state1"].numpy()


def run_ours(alpha=0.99, eps=1e-8, weight_decay=0.0):
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax_rms.rmsprop(
            torch_runs.schedule_of(RATES), decay=alpha, eps=eps, eps_in_sqrt=False
        ),
    )
    path, (_, (rms, *_)) = torch_runs.run_jax(tx, START, GRADIENTS)
    return path, rms.nu


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.9}, {"eps": 1e-3}, {"weight_decay": 0.1}],
    ids=str,
)
def test_every_option(options):
    theirs, their_nu = run_theirs(**options)
    ours, our_nu = run_ours(**options)
    assert torch_runs.relative_error(ours, theirs, START) <= BOUND
    np.testing.assert_array_less(
        abs(our_nu - their_nu), BOUND * their_nu + torch_runs.TINY
    )


def test_momentum_is_ignored():
    np.testing.assert_array_equal(run_theirs(momentum=0.9)[0], run_theirs()[0])


@pytest.mark.parametrize(
    "change",
    [
        {"eps_in_sqrt": True},
        {"initial_scale": 1.0},
        {"centered": True},
        {"momentum": 0.9},
        {"decay": 0.9},
        {"eps": 1e-3},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_other_settings_are_rejected(change):
    """With any of them the path is far from that of the defaults."""
    settings = {"decay": 0.99, "eps_in_sqrt": False} | change
    path = reference.rmsprop(GRADIENTS, RATES, params=START, **settings)
    assert torch_runs.relative_error(path, run_theirs()[0], START) >= 100 * BOUND
