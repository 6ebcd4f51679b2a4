# SPDX-License-Identifier: Apache-2.0
"""Schedules read from the state dicts of PyTorch's schedulers, against these."""

import copy
import itertools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import frameworks

from optax_rms.dialects import torch as dialect
from optax_rms.dialects.torch import _schedules as schedules

torch = frameworks.require("torch")
pytestmark = pytest.mark.parity
lr_scheduler = torch.optim.lr_scheduler

BASES = (0.1, 0.02)
EPOCHS = 41
# Each ends, or ends its first period, well before EPOCHS.
FACTORS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.7),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 9, 9], 0.5),
    "MultiStepLR at once": lambda o: lr_scheduler.MultiStepLR(o, [0, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, 7),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 0.9, 7),
    "LinearLR to 0": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 11, 2.0),
}
OTHERS = {
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 1e-3),
    "CosineAnnealingLR to 0": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingLR of 1": lambda o: lr_scheduler.CosineAnnealingLR(o, 1, 1e-3),
    "CosineAnnealingLR of 7.5": lambda o: lr_scheduler.CosineAnnealingLR(o, 7.5, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 3, 2, 1e-3
    ),
    "CosineAnnealingWarmRestarts of 5": lambda o: (
        lr_scheduler.CosineAnnealingWarmRestarts(o, 5)
    ),
}
CYCLES = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, [0.3, 0.5], EPOCHS, cycle_momentum=False
    ),
    "OneCycleLR, linear, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, 0.3, 30, anneal_strategy="linear", three_phase=True, cycle_momentum=False
    ),
}
SINGLE = FACTORS | OTHERS


def sequence(milestones, *builders):
    return lambda o: lr_scheduler.SequentialLR(o, [b(o) for b in builders], milestones)


def chain(*builders):
    return lambda o: lr_scheduler.ChainedScheduler([b(o) for b in builders])


warm_up, cosine = FACTORS["LinearLR"], OTHERS["CosineAnnealingLR"]
NESTED = {
    "SequentialLR of three": sequence([3, 12], warm_up, cosine, FACTORS["StepLR"]),
    "ChainedScheduler of three": chain(warm_up, cosine, FACTORS["StepLR"]),
    "SequentialLR of a chain": sequence(
        [6], chain(warm_up, FACTORS["ConstantLR"]), FACTORS["StepLR"]
    ),
    "SequentialLR of a sequence": sequence(
        [9], sequence([3], warm_up, FACTORS["PolynomialLR"]), FACTORS["StepLR"]
    ),
    "ChainedScheduler of a sequence": chain(
        sequence([3], warm_up, cosine), FACTORS["StepLR"]
    ),
    "SequentialLR from OneCycleLR": sequence([8], CYCLES["OneCycleLR"], cosine),
    "ChainedScheduler with OneCycleLR": chain(CYCLES["OneCycleLR"], warm_up),
}
PAIRS = list(itertools.permutations(SINGLE, 2))


def make_optimizer(**settings):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in BASES]
    groups = [{"params": [p], "lr": b} for p, b in zip(params, BASES, strict=True)]
    return torch.optim.RMSprop(groups, **settings)


def life(build, epochs=EPOCHS):
    """For each epoch, the rates of the groups, and both state dicts."""
    optimizer = make_optimizer()
    with warnings.catch_warnings():
        # A SequentialLR of PyTorch warns of its own steps.
        warnings.simplefilter("ignore")
        scheduler = build(optimizer)
        optimizer.step()
        rates, saved = [], []
        for epoch in range(epochs):
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            saved.append(
                copy.deepcopy([scheduler.state_dict(), optimizer.param_groups])
            )
            if epoch + 1 < epochs:
                scheduler.step()
    return np.array(rates), saved


def compare(build, moments, tolerance, evaluate, epochs=EPOCHS):
    """Compare the rates from each moment on, relative to the largest rate."""
    rates, saved = life(build, epochs)
    for moment in moments:
        for i, scheduler in enumerate(schedules.from_state_dict(*saved[moment])):
            ahead = np.arange(epochs - moment) + scheduler.epoch
            actual = evaluate(scheduler, ahead)
            error = np.max(abs(actual - rates[moment:, i])) / np.max(rates[:, i])
            assert error <= tolerance, (moment, i)


def in_numpy(scheduler, epochs):
    return scheduler.rate(epochs)


def in_jax(scheduler, epochs):
    rate = jax.jit(jax.vmap(scheduler.rate))
    return np.asarray(rate(jnp.asarray(epochs, jnp.int32)), np.float64)


# Some ten roundings in float64 per epoch, here and in PyTorch.
WIDE = 10 * EPOCHS * np.finfo(np.float64).eps
# In float32, some ten, where no recursion adds them up.
NARROW = 10 * np.finfo(np.float32).eps


@pytest.mark.parametrize("name", SINGLE | CYCLES)
def test_rates_continue_over_the_whole_life(name):
    """From every epoch, in float64, to far behind the end."""
    compare((SINGLE | CYCLES)[name], range(30), WIDE, in_numpy, _end(name))


def _end(name):
    # PyTorch raises an error behind the end.
    return 31 if name == "OneCycleLR, linear, three phases" else EPOCHS


@pytest.mark.parametrize("name", SINGLE | CYCLES)
def test_rates_in_jax(name):
    compare((SINGLE | CYCLES)[name], [0, 8], NARROW, in_jax, _end(name))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_sequences_of_two(first, second):
    build = sequence([6], SINGLE[first], SINGLE[second])
    compare(build, [0, 1, 5, 6, 7, 20], WIDE, in_numpy)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_chains_of_two(first, second):
    compare(chain(SINGLE[first], SINGLE[second]), [0, 6, 20], WIDE, _by_recursion)


def _by_recursion(scheduler, epochs):
    """The rates by the steps of the recursion, and those that have another form."""
    every = np.arange(epochs[-1] + 1)
    rates = [scheduler.base]
    for a, b in zip(*scheduler.recursion(every), strict=True):
        rates.append(rates[-1] * a + b)
    rates = np.array(rates[1:])
    has_closed_form = scheduler.factor or scheduler.overwrites
    known = every if has_closed_form else every[: scheduler.life + 1]
    np.testing.assert_allclose(
        scheduler.rate(known), rates[known], rtol=0, atol=WIDE * rates.max()
    )
    return rates[epochs]


@pytest.mark.parametrize("name", NESTED)
def test_schedulers_of_schedulers_in_jax(name):
    """Beyond the table of a chain the recursion goes on in float32, step by step."""
    compare(NESTED[name], [0, 7, 20], EPOCHS * NARROW, in_jax)


def test_long_decays_are_exact_in_float32():
    """The base in float32, to this power, would be off by 0.1 %."""
    saved = {"gamma": 0.99999, "base_lrs": [1.0], "last_epoch": 0}
    (scheduler,) = schedules.from_state_dict(saved, [{}])
    rate = scheduler.rate(jnp.int32(100_000))
    np.testing.assert_allclose(rate, 0.99999**100_000, rtol=NARROW)


def test_the_end_of_a_long_cosine_is_exact_in_float32():
    saved = {"T_max": 10**5, "eta_min": 0.0, "base_lrs": [1.0], "last_epoch": 0}
    (scheduler,) = schedules.from_state_dict(saved, [{}])
    rate = scheduler.rate(jnp.int32(10**5 - 3))
    exact = math.sin(1.5e-5 * math.pi) ** 2
    np.testing.assert_allclose(rate, exact, rtol=NARROW)


def convert(arrays):
    return {name: jnp.asarray(array.numpy()) for name, array in arrays.items()}


def run(optimizer, scheduler, steps, period=1):
    """Steps with gradients of 1: each moves by the rate, as alpha is 0."""
    path = []
    for t in range(steps):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.step()
        path.append([g["params"][0].detach()[0].item() for g in optimizer.param_groups])
        if (t + 1) % period == 0:
            scheduler.step()
    return np.array(path)


def steps_here(tx, state, steps):
    ones = {0: jnp.ones(2), 1: jnp.ones(2)}
    update = jax.jit(tx.update)
    moved = []
    for _ in range(steps):
        updates, state = update(ones, state)
        moved.append([float(updates[0][0]), float(updates[1][0])])
    return np.cumsum(moved, axis=0), state


PLAIN = {"alpha": 0.0, "eps": 0.0}


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("build", [warm_up, NESTED["SequentialLR of three"]])
def test_runs_continue(build, period):
    """Both groups, 10 steps in PyTorch, 30 in both; then 5 more in PyTorch."""
    optimizer = make_optimizer(**PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = build(optimizer)
        before = run(optimizer, scheduler, 10, period)[-1]
        arguments = {
            "lr_scheduler": copy.deepcopy(scheduler.state_dict()),
            "steps_per_scheduler_step": period,
        }
        saved = copy.deepcopy(optimizer.state_dict())
        # The scheduler's step is due after 2 of these, 10 being no multiple of 4.
        tail = run(
            optimizer, scheduler, 10 % period and period - 10 % period, period=99
        )
        if len(tail):
            scheduler.step()
        rest = run(optimizer, scheduler, 30 - len(tail), period)
    expected = np.concatenate([tail.reshape(-1, 2), rest]) - before
    tx, state = dialect.import_state(saved, convert, **arguments)
    actual, state = steps_here(tx, state, 30)
    # 30 roundings of numbers of at most 1.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=30 * 1.2e-7)

    exported = dialect.export_state(state, dict, like=saved, **arguments)
    for group, original in zip(
        exported["param_groups"], optimizer.param_groups, strict=True
    ):
        np.testing.assert_allclose(group["lr"], original["lr"], rtol=1e-6)
    optimizer.load_state_dict(exported)


def test_a_scheduler_after_load_state_dict():
    optimizer = make_optimizer(**PLAIN)
    scheduler = cosine(optimizer)
    run(optimizer, scheduler, 5)
    again = make_optimizer(**PLAIN)
    loaded = cosine(again)
    saved, scheduled = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
    again.load_state_dict(saved)
    loaded.load_state_dict(scheduled)
    tx, state = dialect.import_state(
        copy.deepcopy(saved), convert, lr_scheduler=loaded.state_dict()
    )
    expected = run(again, loaded, 40)
    actual, _ = steps_here(tx, state, 40)
    np.testing.assert_allclose(actual, expected - 1, rtol=0, atol=40 * 1.2e-7)


def test_groups_of_equal_rates_are_not_divided():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.RMSprop([{"params": [p]} for p in params], lr=0.1)
    scheduler = cosine(optimizer)
    run(optimizer, scheduler, 3)
    _, state = dialect.import_state(
        optimizer.state_dict(), convert, lr_scheduler=scheduler.state_dict()
    )
    assert len(state) == 3


def imported(build, steps=4, change=lambda optimizer, scheduler: None, **arguments):
    optimizer = make_optimizer(momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = build(optimizer)
        for _ in range(steps):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
            optimizer.param_groups[1]["params"][0].grad = torch.ones(2)
            optimizer.step()
            scheduler.step(*arguments.pop("metric", ()))
    change(optimizer, scheduler)
    saved = scheduler.state_dict()
    return dialect.import_state(
        optimizer.state_dict(), convert, **{"lr_scheduler": saved} | arguments
    )


swa = frameworks.require("torch.optim.swa_utils")
REFUSED = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2),
    "SWALR": lambda o: swa.SWALR(o, 0.05),
    "OneCycleLR with cycle_momentum=True": lambda o: lr_scheduler.OneCycleLR(o, 1, 20),
}


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_without_a_schedule_are_refused(name):
    for build in (REFUSED[name], sequence([2], warm_up, REFUSED[name])):
        with pytest.raises(ValueError, match=rf"{name}(.|\n)* Pass learning_rate"):
            imported(build)


def test_a_scheduler_of_a_metric_is_refused():
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau(.|\n)* Pass learning"):
        imported(lr_scheduler.ReduceLROnPlateau, metric=(1.0,), steps=1)


def test_fractions_of_epochs_are_refused():
    with pytest.raises(ValueError, match=r"T_cur 1\.5 (.|\n)*fractions"):
        imported(
            OTHERS["CosineAnnealingWarmRestarts"],
            change=lambda optimizer, scheduler: scheduler.step(4.5),
        )


def set_rate(optimizer, scheduler):
    optimizer.param_groups[1]["lr"] *= 0.5


def test_rates_changed_by_hand_are_refused():
    message = r"param_groups\[1\]\['lr'\] is 0.00\d*, but lr_scheduler gives 0.01"
    with pytest.raises(ValueError, match=message):
        imported(FACTORS["StepLR"], change=set_rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.1}, "must not both be given"),
        ({"steps_per_scheduler_step": 5}, "must be at 20 to 25 steps, but has taken 4"),
        ({"steps_per_scheduler_step": 0}, "steps_per_scheduler_step must be"),
        ({"lr_scheduler": "StepLR"}, "must be what scheduler.state_dict() returned"),
        ({"lr_scheduler": {"gamma": 0.1}}, "a list of 2 base_lrs"),
        (
            {"lr_scheduler": {"base_lrs": [1.0], "gamma": 0.1, "last_epoch": 4}},
            "a list of 2 base_lrs for as many param_groups, got [1.0]",
        ),
        (
            {"lr_scheduler": {"base_lrs": [1.0, 1.0], "decay": 0.1, "last_epoch": 4}},
            "has the keys ['decay'], and no scheduler",
        ),
        (
            {"lr_scheduler": {"base_lrs": [1, 1], "gamma": np.nan, "last_epoch": 4}},
            "lr_scheduler['gamma'] must be a finite number",
        ),
        (
            {"lr_scheduler": {"base_lrs": [1, 1], "gamma": 0.1, "last_epoch": None}},
            "lr_scheduler['last_epoch'] must be a number",
        ),
        (
            {"lr_scheduler": {"base_lrs": [1, 1], "base_values": []}},
            "a scheduler of timm",
        ),
        (
            {"lr_scheduler": None, "steps_per_scheduler_step": 1, "learning_rate": 1},
            "no use without lr_scheduler",
        ),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        imported(FACTORS["StepLR"], **arguments)


def test_unequal_numbers_of_steps_are_asked_about():
    saved = {"gamma": 0.1, "base_lrs": [0.1, 0.02], "last_epoch": 2}
    with pytest.raises(ValueError, match=r"taken 2 steps, the optimizer 4; pass steps"):
        imported(FACTORS["StepLR"], lr_scheduler=saved)


def test_steps_that_a_scaler_left_out():
    """With steps_per_scheduler_step=1, the scheduler may be ahead of the optimizer."""
    optimizer = make_optimizer(**PLAIN)
    scheduler = FACTORS["StepLR"](optimizer)
    run(optimizer, scheduler, 4)
    scheduler.step()
    saved, schedule = optimizer.state_dict(), scheduler.state_dict()
    tx, state = dialect.import_state(
        copy.deepcopy(saved),
        convert,
        lr_scheduler=schedule,
        steps_per_scheduler_step=1,
    )
    actual, _ = steps_here(tx, state, 9)
    before = optimizer.param_groups[0]["params"][0][0].item()
    expected = run(optimizer, scheduler, 9)[:, 0] - before
    np.testing.assert_allclose(actual[:, 0], expected, rtol=0, atol=9 * 1.2e-7)


def test_a_forgotten_scheduler_is_warned_of():
    with pytest.warns(UserWarning, match=r"Pass lr_scheduler=scheduler.state_dict"):
        _, state = imported(cosine, lr_scheduler=None)
    optimizer = make_optimizer(momentum=0.9)
    cosine(optimizer)
    like = optimizer.state_dict()
    names = {0: np.ones(2, np.float32), 1: np.ones(2, np.float32)}
    with pytest.warns(UserWarning, match="The rate in like is written"):
        dialect.export_state(state, dict, names, like=like)
    exported = dialect.export_state(state, dict, names, like=like, learning_rate=0.5)
    assert [group["lr"] for group in exported["param_groups"]] == [0.5, 0.5]


def test_rates_in_tensors_are_exported_as_such():
    optimizer = make_optimizer(**PLAIN)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    scheduler = cosine(optimizer)
    run(optimizer, scheduler, 3)
    arguments = {"lr_scheduler": scheduler.state_dict()}
    saved = copy.deepcopy(optimizer.state_dict())
    _, state = dialect.import_state(saved, convert, **arguments)
    exported = dialect.export_state(state, dict, like=saved, **arguments)
    for group, original in zip(
        exported["param_groups"], saved["param_groups"], strict=True
    ):
        assert group["lr"].dtype == original["lr"].dtype
        assert group["lr"].shape == original["lr"].shape
        np.testing.assert_allclose(group["lr"], original["lr"], rtol=1e-6)
