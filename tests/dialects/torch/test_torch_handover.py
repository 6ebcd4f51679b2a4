# SPDX-License-Identifier: Apache-2.0
"""Hand-over from and to PyTorch, on state dicts of NumPy arrays."""

import copy
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import trajectory
from helpers.comparison import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import optax_rms
from optax_rms.dialects import torch as dialect

SHAPES = {"dense.weight": (2, 3), "dense.bias": (2,), "scale": ()}
NAMES = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
GROUP = {"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.0}
TIMM = {"decoupled_decay": False, "lr_in_momentum": True}


def convert(arrays):
    """Renames, and transposes the kernel."""
    return {
        "dense": {
            "kernel": jnp.asarray(arrays["dense.weight"]).T,
            "bias": jnp.asarray(arrays["dense.bias"]),
        },
        "scale": jnp.asarray(arrays["scale"]),
    }


def convert_back(params):
    return {
        "dense.weight": params["dense"]["kernel"].T,
        "dense.bias": params["dense"]["bias"],
        "scale": params["scale"],
    }


def make_state_dict(*groups, seed=0, step=7):
    """A state dict of `SHAPES`, with settings for all, or for one each."""
    rng = np.random.default_rng(seed)
    groups = [GROUP | group for group in groups or [{}]]
    ids = [[0, 1, 2]] if len(groups) == 1 else [[0], [1], [2]]
    groups = [group | {"params": own} for group, own in zip(groups, ids, strict=True)]
    group_of = {i: group for group in groups for i in group["params"]}
    state = {}
    for i, shape in enumerate(SHAPES.values()):
        state[i] = {"step": np.float32(step)}
        mean = np.asarray(rng.normal(size=shape), np.float32)
        spread = np.asarray(rng.random(size=shape), np.float32)
        state[i]["square_avg"] = np.asarray(mean**2 + spread)
        if group_of[i].get("momentum"):
            state[i]["momentum_buffer"] = np.asarray(rng.normal(size=shape), np.float32)
        if group_of[i].get("centered"):
            state[i]["grad_avg"] = mean
    return {"state": state, "param_groups": groups}


def test_every_slot_arrives_where_its_parameter_does():
    state_dict = make_state_dict({"momentum": 0.5, "centered": True})
    _, (stddev, trace, schedule) = dialect.import_state(state_dict, convert, NAMES)
    kernel = jax.tree.map(
        lambda tree: np.asarray(tree["dense"]["kernel"]).T,
        (stddev.mu, stddev.variance, trace.trace),
        is_leaf=lambda x: isinstance(x, dict),
    )
    stored = state_dict["state"][0]
    variance = stored["square_avg"] - np.square(stored["grad_avg"], dtype=np.float64)
    np.testing.assert_array_equal(kernel[0], stored["grad_avg"])
    np.testing.assert_allclose(kernel[1], variance, rtol=1e-7)  # One rounding.
    np.testing.assert_array_equal(kernel[2], stored["momentum_buffer"])
    assert schedule.count == 7


def test_imported_state_continues_by_the_formula():
    """From its own square_avg 4, a gradient of 2 is divided by 2."""
    state_dict = make_state_dict()
    for stored in state_dict["state"].values():
        stored["square_avg"] = np.full_like(stored["square_avg"], 4)
    tx, state = dialect.import_state(state_dict, convert, NAMES)
    params = jax.tree.map(jnp.zeros_like, convert(NAMES))
    updates, _ = tx.update(jax.tree.map(lambda p: p + 2, params), state, params)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.1, rtol=1e-6)


def test_schedules_continue():
    state_dict = make_state_dict(step=7)
    one = jax.tree.map(jnp.ones_like, convert(NAMES))

    def steps(learning_rate):
        tx, state = dialect.import_state(state_dict, convert, NAMES, learning_rate)
        first, state = tx.update(one, state)
        second, _ = tx.update(one, state)
        return first["scale"], second["scale"]

    # Piecewise: 1 up to step 7, which is the eighth, then 0.5.
    constant, changing = steps(1.0), steps(lambda count: jnp.where(count <= 7, 1, 0.5))
    assert changing[0] == constant[0]
    assert changing[1] == 0.5 * constant[1]


def test_groups_become_a_partition():
    state_dict = make_state_dict(
        {"lr": 1.0, "momentum": 0.9},
        {"lr": 2.0, "centered": True},
        {"lr": 4.0, "maximize": True, "weight_decay": 0.1},
    )
    tx, state = dialect.import_state(state_dict, convert, NAMES)
    params = jax.tree.map(jnp.ones_like, convert(NAMES))
    gradients = jax.tree.map(lambda p: 3 * p, params)
    updates, _ = tx.update(gradients, state, params)
    for i, (name, group) in enumerate(
        zip(SHAPES, state_dict["param_groups"], strict=True)
    ):
        alone = {
            "state": {0: state_dict["state"][i]},
            "param_groups": [group | {"params": [0]}],
        }
        tx, state = dialect.import_state(alone, lambda a, name=name: a[name], [name])
        own = np.ones(SHAPES[name], np.float32)
        expected, _ = tx.update(jnp.asarray(3 * own), state, jnp.asarray(own))
        np.testing.assert_array_equal(convert_back(updates)[name], expected)


def test_an_imported_partition_can_be_donated():
    state_dict = make_state_dict({"lr": 1.0}, {"lr": 2.0}, {"lr": 4.0})
    tx, state = dialect.import_state(state_dict, convert, NAMES)
    gradients = jax.tree.map(jnp.ones_like, convert(NAMES))
    expected = jax.jit(tx.update)(gradients, state)
    actual = jax.jit(tx.update, donate_argnums=1)(gradients, state)
    assert_same_bits(actual, expected)


def test_groups_of_the_same_settings_may_be_joined():
    state_dict = make_state_dict({}, {}, {})
    names = dict(NAMES)

    def join(arrays):
        return np.concatenate([np.ravel(array) for array in arrays.values()])

    _, state = dialect.import_state(state_dict, join, names)
    expected = join({i: s["square_avg"] for i, s in state_dict["state"].items()})
    np.testing.assert_array_equal(state[0].nu, expected)


def test_learning_rates_of_groups():
    state_dict = make_state_dict({"lr": 1.0}, {"lr": 2.0}, {"lr": 4.0})
    one = jax.tree.map(jnp.ones_like, convert(NAMES))

    def first_steps(learning_rate):
        tx, state = dialect.import_state(
            state_dict, convert, NAMES, learning_rate=learning_rate
        )
        return convert_back(tx.update(one, state)[0])

    rates = {"dense.weight": 1.0, "dense.bias": 8.0, "scale": 3.0}
    unchanged, changed = first_steps(None), first_steps([None, 8.0, lambda count: 3.0])
    for (name, rate), group in zip(
        rates.items(), state_dict["param_groups"], strict=True
    ):
        np.testing.assert_allclose(
            changed[name], unchanged[name] * rate / group["lr"], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("timm", "fresh"), [({}, 0.0), (TIMM, 1.0)], ids=["torch", "timm"]
)
def test_parameters_without_state_start_fresh(timm, fresh):
    group = timm | {"momentum": 0.9, "centered": True}
    state_dict = make_state_dict(group)
    del state_dict["state"][1]
    state_dict["state"][2] = {}
    make = dialect.rmsprop_tf if timm else dialect.rmsprop
    _, state = dialect.import_state(state_dict, convert, NAMES)
    expected = make(**GROUP | group).init(convert(NAMES))
    for name in ("dense.bias", "scale"):
        for part, fresh_part in zip(state[:2], expected[:2], strict=True):
            for field in set(part._fields) - {"count"}:
                np.testing.assert_array_equal(
                    convert_back(getattr(part, field))[name],
                    convert_back(getattr(fresh_part, field))[name],
                )
    assert np.all(state[0].variance["scale"] == fresh)
    exported = dialect.export_state(state, convert_back, NAMES, like=state_dict)
    assert exported["state"].keys() == {0}


def test_momentum_of_timm_changes_its_sign():
    state_dict = make_state_dict(TIMM | {"momentum": 0.9})
    _, state = dialect.import_state(state_dict, convert, NAMES)
    np.testing.assert_array_equal(
        state[2].trace["scale"], -state_dict["state"][2]["momentum_buffer"]
    )


@pytest.mark.parametrize("step", [7, 7.0, np.float32(7), np.int64(7), np.array([7.0])])
def test_steps_of_every_kind(step):
    state_dict = make_state_dict()
    for stored in state_dict["state"].values():
        stored["step"] = step
    _, state = dialect.import_state(state_dict, convert, NAMES)
    assert state[2].count == 7
    exported = dialect.export_state(state, convert_back, NAMES, like=state_dict)
    restored = exported["state"][0]["step"]
    assert restored == step
    assert np.shape(restored) == np.shape(step)


def test_parameters_that_lag_behind_still_do():
    state_dict = make_state_dict()
    state_dict["state"][1]["step"] = np.float32(3)
    del state_dict["state"][2]
    tx, state = dialect.import_state(state_dict, convert, NAMES)
    _, state = tx.update(jax.tree.map(jnp.ones_like, convert(NAMES)), state)
    exported = dialect.export_state(state, convert_back, NAMES, like=state_dict)
    steps = {i: float(stored["step"]) for i, stored in exported["state"].items()}
    assert steps == {0: 8, 1: 4, 2: 1}


def test_export_to_a_new_optimizer():
    state_dict = make_state_dict({"momentum": 0.9})
    _, state = dialect.import_state(state_dict, convert, NAMES)
    new = {"state": {}, "param_groups": state_dict["param_groups"]}
    exported = dialect.export_state(state, convert_back, NAMES, like=new)
    assert_same_bits(exported["state"], state_dict["state"])


def test_names_come_from_argument_state_dict_or_keys():
    """From the argument, else from the state dict, else the keys."""
    state_dict = make_state_dict()
    given = []
    for names in (list(NAMES), None):
        dialect.import_state(state_dict, lambda a: given.append(list(a)) or a, names)
    state_dict["param_groups"][0]["param_names"] = ["a", "b", "c"]
    dialect.import_state(state_dict, lambda a: given.append(list(a)) or a)
    assert [list(NAMES), [0, 1, 2], ["a", "b", "c"]] == given[1::2]


def test_names_of_a_mapping_are_found_by_param_names():
    """Its order does not matter if the state dict tells the right one."""
    state_dict = make_state_dict()
    _, expected = dialect.import_state(state_dict, convert, NAMES)
    state_dict["param_groups"][0]["param_names"] = list(NAMES)
    names = dict(reversed(NAMES.items()))
    _, state = dialect.import_state(state_dict, convert, names)
    assert_same_bits(state, expected)


def test_flat_and_textual_state_dicts():
    state_dict = make_state_dict({"momentum": 0.9})
    flat = {
        f"state.{i}.{slot}": array
        for i, stored in state_dict["state"].items()
        for slot, array in stored.items()
    }
    flat["param_groups"] = json.dumps(state_dict["param_groups"])
    _, expected = dialect.import_state(state_dict, convert, NAMES)
    _, state = dialect.import_state(flat, convert, NAMES)
    assert_same_bits(state, expected)
    assert_same_bits(
        dialect.export_state(state, convert_back, NAMES, like=flat), state_dict
    )


def test_parameters_may_be_split_joined_and_reshaped():
    state_dict = make_state_dict({"centered": True})

    def cut(arrays):
        top, bottom = jnp.asarray(arrays["dense.weight"])
        rest = [jnp.ravel(arrays[name]) for name in ("dense.bias", "scale")]
        return {"rows": [top, bottom[:, None]], "rest": jnp.concatenate(rest)}

    def paste(params):
        top, bottom = params["rows"]
        return {
            "dense.weight": jnp.stack([top, bottom[:, 0]]),
            "dense.bias": params["rest"][:2],
            "scale": params["rest"][2],
        }

    _, state = dialect.import_state(state_dict, cut, NAMES)
    weight = state_dict["state"][0]["grad_avg"]
    np.testing.assert_array_equal(state[0].mu["rows"][1][:, 0], weight[1])
    exported = dialect.export_state(state, paste, NAMES, like=state_dict)
    _, again = dialect.import_state(exported, cut, NAMES)
    assert_same_bits(again, state)


def test_complex_parameters():
    rng = np.random.default_rng(0)
    parts = rng.random((3, 4, 2)).astype(np.float32) @ np.array([1, 1j], np.complex64)
    parts[1] += 1 + 1j
    slots = dict(zip(("grad_avg", "square_avg", "momentum_buffer"), parts, strict=True))
    state_dict = {
        "state": {0: {"step": 1, **slots}},
        "param_groups": [GROUP | {"params": [0], "centered": True, "momentum": 0.9}],
    }

    def as_complex(arrays):
        return jnp.reshape(arrays[0], (2, 2))

    def as_pairs(arrays):
        return np.stack([arrays[0].real, arrays[0].imag], axis=-1)

    for convert in (as_complex, as_pairs):
        tx, state = dialect.import_state(state_dict, convert)
        expected = tx.init(jnp.asarray(convert([slots["grad_avg"]])))
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected)
    tx, state = dialect.import_state(state_dict, as_complex)
    np.testing.assert_allclose(
        state[0].variance.imaginary.ravel(),
        slots["square_avg"].imag - slots["grad_avg"].imag ** 2,
        rtol=1e-6,
    )
    exported = dialect.export_state(
        state, lambda params: {0: params.ravel()}, like=state_dict
    )
    assert_same_bits(exported["state"], state_dict["state"])


def test_float64():
    state_dict = make_state_dict({"momentum": 0.9})
    for stored in state_dict["state"].values():
        stored |= {
            k: v.astype(np.float64) / 3 for k, v in stored.items() if k != "step"
        }
    with pytest.raises(ValueError, match="jax_enable_x64"):
        dialect.import_state(state_dict, lambda arrays: arrays)
    with trajectory.x64():
        _, state = dialect.import_state(state_dict, lambda arrays: arrays)
        exported = dialect.export_state(state, dict, like=state_dict)
    assert_same_bits(exported["state"], state_dict["state"])


def floats(shape, *, low=None, high=None):
    return hnp.arrays(
        np.float32, shape, elements=st.floats(low, high, width=32, allow_nan=False)
    )


@st.composite
def state_dicts(draw):
    """Any finite state of either optimizer, with or without groups."""
    timm = draw(st.sampled_from([{}, TIMM, TIMM | {"lr_in_momentum": False}]))
    options = st.fixed_dictionaries(
        {"momentum": st.sampled_from([0.0, 0.9]), "centered": st.booleans()}
    )
    groups = [timm | draw(options) for _ in range(draw(st.sampled_from([1, 3])))]
    state_dict = make_state_dict(*groups, step=draw(st.integers(1, 2**24)))
    for i, stored in list(state_dict["state"].items()):
        if draw(st.integers(0, 4)) == 0 and i:
            del state_dict["state"][i]
            continue
        shape = np.shape(stored["square_avg"])
        # A mean of more than 1e19 has no square in float32.
        mean = draw(floats(shape, low=-(2.0**63), high=2.0**63))
        near = mean**2 * draw(floats(shape, low=1 - 2.0**-16, high=1 + 2.0**-16))
        square = draw(st.one_of(st.just(near), floats(shape, low=0, high=2.0**127)))
        stored["square_avg"] = np.asarray(square, np.float32)
        if "grad_avg" in stored:
            stored["grad_avg"] = mean
        if "momentum_buffer" in stored:
            stored["momentum_buffer"] = draw(
                floats(shape, low=-(2.0**99), high=2.0**99)
            )
    return state_dict


@settings(max_examples=60, deadline=None, derandomize=True)
@given(state_dicts())
def test_round_trip_is_the_identity(state_dict):
    """Bit for bit: import, export, import; and the export itself, unless centered."""
    _, state = dialect.import_state(state_dict, convert, NAMES)
    exported = dialect.export_state(state, convert_back, NAMES, like=state_dict)
    _, again = dialect.import_state(exported, convert, NAMES)
    assert_same_bits(again, state)
    for i, stored in exported["state"].items():
        if "grad_avg" not in stored:
            assert_same_bits(stored, state_dict["state"][i])


def test_conversions_may_use_their_memory_again():
    state_dict = make_state_dict({"momentum": 0.9})
    memory = {name: np.zeros_like(array) for name, array in NAMES.items()}

    def copy_to_memory(arrays):
        for name, array in arrays.items():
            memory[name][...] = array
        return memory

    _, state = dialect.import_state(state_dict, copy_to_memory, NAMES)
    for field, slot in (
        (state[0].nu, "square_avg"),
        (state[1].trace, "momentum_buffer"),
    ):
        np.testing.assert_array_equal(
            field["dense.weight"], state_dict["state"][0][slot]
        )


def test_import_and_export_leave_their_input_alone():
    state_dict = make_state_dict({"momentum": 0.9, "centered": True})
    before = copy.deepcopy(state_dict)
    _, state = dialect.import_state(state_dict, convert, NAMES)
    imported = jax.tree.map(np.array, state)
    exported = dialect.export_state(state, convert_back, NAMES, like=state_dict)
    assert_same_bits(state_dict, before)
    for stored in (*state_dict["state"].values(), *exported["state"].values()):
        for slot in ("square_avg", "momentum_buffer", "grad_avg"):
            stored[slot][...] = -1
    assert_same_bits(state, imported)


def set_group(**settings):
    return lambda state_dict: state_dict["param_groups"][0].update(settings)


def drop_group(key):
    return lambda state_dict: state_dict["param_groups"][0].pop(key)


def set_state(key, **slots):
    return lambda state_dict: state_dict["state"][key].update(slots)


def change_state(key, slot, function):
    def damage(state_dict):
        stored = state_dict["state"][key]
        stored[slot] = function(stored[slot])

    return damage


def drop_state(key, slot):
    return lambda state_dict: state_dict["state"][key].pop(slot)


def rename_state(key, slot, new):
    def damage(state_dict):
        stored = state_dict["state"][key]
        stored[new] = stored.pop(slot)

    return damage


def swap_state(state_dict):
    state = state_dict["state"]
    state[0], state[1] = state[1], state[0]


def poison(value):
    def damage(array):
        array = np.array(array)
        array.flat[0] = value
        return array

    return damage


# What is done to a state dict with momentum and centered, and what the message says.
DAMAGE = {
    "another mapping": (lambda s: s.clear() or s.update(w=1), "got ['w']"),
    "whole checkpoint": (lambda s: s.update(model={}), "'model'"),
    "no groups": (lambda s: s.pop("param_groups"), "'param_groups'"),
    "no state": (lambda s: s.pop("state"), "'state'"),
    "state is a list": (lambda s: s.update(state=[]), "state is a list"),
    "groups are empty": (lambda s: s.update(param_groups=[]), "param_groups must be"),
    "groups are a mapping": (lambda s: s.update(param_groups={"a": 1}), "list of"),
    "groups are no JSON": (lambda s: s.update(param_groups="[{"), "no JSON"),
    "group is a list": (lambda s: s.update(param_groups=[[0]]), "param_groups[0] must"),
    "no params": (drop_group("params"), "param_groups[0] must"),
    "params are lists": (set_group(params=[[0], [1]]), "param_groups[0] must"),
    "params are empty": (set_group(params=[]), "there are no parameters"),
    "params are text": (set_group(params="012"), "param_groups[0] must"),
    "parameter twice": (
        set_group(params=[0, 1, 2, 1]),
        "parameter 1 of param_groups[0]",
    ),
    "parameter in two groups": (
        lambda s: s["param_groups"].append(s["param_groups"][0] | {"params": [2]}),
        "parameter 2 of param_groups[1]['params'] is in param_groups[0]",
    ),
    "parameter missing": (set_group(params=[0, 2]), "state[1] belongs to no parameter"),
    "parameter renumbered": (set_group(params=[0, 1, 3]), "state[2] belongs to no"),
    "no lr": (drop_group("lr"), "param_groups[0] has no 'lr'"),
    "no alpha": (drop_group("alpha"), "param_groups[0] has no 'alpha'"),
    "lr renamed": (
        lambda s: s["param_groups"][0].update(rate=s["param_groups"][0].pop("lr")),
        "settings that RMSprop does not have: ['rate']",
    ),
    "group of Adam": (set_group(betas=(0.9, 0.999)), "['betas']"),
    "lr NaN": (set_group(lr=np.nan), "param_groups[0]['lr'] must be a finite number"),
    "lr negative": (set_group(lr=-0.1), "param_groups[0]['lr'] must be a finite"),
    "lr infinite": (set_group(lr=np.float32(np.inf)), "param_groups[0]['lr'] must"),
    "lr None": (set_group(lr=None), "param_groups[0]['lr'] must be a number"),
    "lr complex": (set_group(lr=1j), "param_groups[0]['lr'] must be a number"),
    "lr of two": (set_group(lr=np.ones(2)), "param_groups[0]['lr'] must be a number"),
    "alpha above 1": (set_group(alpha=1.5), "param_groups[0]['alpha'] must be"),
    "alpha NaN": (set_group(alpha=np.float32("nan")), "param_groups[0]['alpha'] must"),
    "eps negative": (set_group(eps=-1e-8), "param_groups[0]['eps'] must be"),
    "eps text": (set_group(eps="1e-8"), "param_groups[0]['eps'] must be a number"),
    "weight_decay NaN": (set_group(weight_decay=np.nan), "['weight_decay'] must be"),
    "momentum above 1": (set_group(momentum=9.0), "['momentum'] must be a finite"),
    "centered text": (set_group(centered="yes"), "['centered'] must be True or False"),
    "maximize number": (set_group(maximize=1), "['maximize'] must be True or False"),
    "timm cut short": (set_group(lr_in_momentum=True), "has no 'decoupled_decay'"),
    "timm's caution": (set_group(**TIMM, caution=2), "['caution'] must be True or"),
    "timm's highest rate": (
        set_group(**TIMM, max_lr_snapshot=-1.0),
        "['max_lr_snapshot'] must be",
    ),
    "momentum lost": (set_group(momentum=0), "(scale) has momentum_buffer, for which"),
    "centered lost": (set_group(centered=False), "(scale) has grad_avg, for which"),
    "no square_avg": (drop_state(1, "square_avg"), "(dense.bias) has no square_avg"),
    "no momentum_buffer": (drop_state(1, "momentum_buffer"), "has no momentum_buffer"),
    "no grad_avg": (drop_state(2, "grad_avg"), "(scale) has no grad_avg"),
    "no step": (drop_state(0, "step"), "(dense.weight) has no step"),
    "slot renamed": (rename_state(0, "grad_avg", "exp_avg"), "has exp_avg, for which"),
    "slot of Adam": (set_state(0, exp_avg_sq=np.ones(2)), "has exp_avg_sq, for which"),
    "slots are a list": (
        lambda s: s["state"].update({0: [1]}),
        "state[0] (dense.weight) must",
    ),
    "key twice": (lambda s: s["state"].update({"0": {}}), "state[0] is there twice"),
    "step negative": (set_state(0, step=-1.0), "(dense.weight)['step'] must be"),
    "step fractional": (set_state(0, step=0.5), "['step'] must be a whole number"),
    "step NaN": (set_state(0, step=np.float32("nan")), "['step'] must be a finite"),
    "step enormous": (set_state(0, step=2.0**40), "['step'] must be a finite"),
    "step of two": (set_state(0, step=np.ones(2)), "['step'] must be a number"),
    "step None": (set_state(0, step=None), "['step'] must be a number"),
    "square_avg transposed": (
        change_state(0, "square_avg", np.transpose),
        "['square_avg'] must be float32[2, 3], got float32[3, 2]",
    ),
    "momentum_buffer cut": (
        change_state(0, "momentum_buffer", lambda x: x[:1]),
        "['momentum_buffer'] must be float32[2, 3], got float32[1, 3]",
    ),
    "grad_avg scalar": (
        change_state(1, "grad_avg", np.sum),
        "(dense.bias)['grad_avg'] must be float32[2], got float32[]",
    ),
    "states swapped": (
        swap_state,
        "(dense.weight)['square_avg'] must be float32[2, 3], got float32[2]",
    ),
    "slot integer": (
        change_state(0, "square_avg", np.int32),
        "must be floating-point or complex, got int32",
    ),
    "slot boolean": (
        change_state(0, "square_avg", np.bool_),
        "must be floating-point or complex, got bool",
    ),
    "slot text": (set_state(0, square_avg="0.5"), "must be an array, got '0.5'"),
    "slot float64": (
        change_state(0, "grad_avg", np.float64),
        "['grad_avg'] must be float32[2, 3], got float64[2, 3]",
    ),
    "slot complex": (
        change_state(0, "momentum_buffer", np.complex64),
        "must be float32[2, 3], got complex64[2, 3]",
    ),
    "square_avg NaN": (
        change_state(0, "square_avg", poison(np.nan)),
        "['square_avg'] must be finite, got 1 numbers that are not",
    ),
    "momentum infinite": (
        change_state(1, "momentum_buffer", poison(np.inf)),
        "(dense.bias)['momentum_buffer'] must be finite",
    ),
    "square_avg negative": (
        change_state(2, "square_avg", lambda x: -x),
        "(scale)['square_avg'] must not be negative",
    ),
    "param_names too few": (
        set_group(param_names=["a"]),
        "the param_names in the state dict are ['a'], but names are",
    ),
    "param_names differ": (set_group(param_names=list("abc")), "leave names out"),
    "param_names twice": (
        set_group(param_names=["scale", "dense.bias", "scale"]),
        "param_names in the state dict",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_and_named(name):
    damage, message = DAMAGE[name]
    state_dict = make_state_dict({"momentum": 0.9, "centered": True})
    dialect.import_state(state_dict, convert, NAMES)
    damage(state_dict)
    for use in (
        lambda: dialect.import_state(state_dict, convert, NAMES),
        lambda: dialect.export_state(None, convert_back, NAMES, like=state_dict),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()


def test_of_a_whole_checkpoint_the_part_is_named():
    checkpoint = {"state_dict": {}, "optimizer_states": [make_state_dict()]}
    with pytest.raises(ValueError, match=r"Is it in \['optimizer_states'\]\[0\]\?"):
        dialect.import_state(checkpoint, convert, NAMES)
    checkpoint = {"model": {}, "optimizer": make_state_dict()}
    with pytest.raises(ValueError, match=r"Is it in \['optimizer'\]\?"):
        dialect.import_state(checkpoint, convert, NAMES)


def test_all_damage_is_in_one_message():
    """Of the settings, and, if those can be trusted, of the state."""
    group = make_state_dict({"momentum": 0.9, "centered": True})
    state = copy.deepcopy(group)
    for name in ("lr NaN", "eps negative", "centered text", "parameter missing"):
        DAMAGE[name][0](group)
    for name in ("no step", "slot text", "no grad_avg", "momentum infinite"):
        DAMAGE[name][0](state)
    expected = {
        id(group): ["['lr']", "['eps']", "['centered']", "2 parameters", "state[1]"],
        id(state): ["no step", "must be an array", "must be finite", "no grad_avg"],
    }
    for state_dict in (group, state):
        with pytest.raises(ValueError, match="the state dict cannot be used") as error:
            dialect.import_state(state_dict, convert, NAMES)
        _, *lines = str(error.value).split("\n- ")
        for line, message in zip(lines, expected[id(state_dict)], strict=True):
            assert message in line


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "3 parameters in param_groups, but 2 names"),
        (["a", "b", "c", "d"], "3 parameters in param_groups, but 4 names"),
        (["a", "b", "a"], "the name 'a' is given to 2 parameters"),
        ("abc", "names must be a list or a mapping, got 'abc'"),
        (3, "names must be a list or a mapping, got 3"),
        (dict.fromkeys(NAMES, 1), "names['scale'] must be an array"),
        (
            NAMES | {"scale": np.zeros(1, np.float32)},
            "(scale)['square_avg'] must be float32[1], got float32[]",
        ),
        (
            NAMES | {"scale": np.zeros((), np.complex64)},
            "(scale)['square_avg'] must be complex64[], got float32[]",
        ),
    ],
    ids=str,
)
def test_wrong_names_are_refused(names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dialect.import_state(make_state_dict(), convert, names)


def test_too_few_param_names_are_refused():
    state_dict = make_state_dict()
    state_dict["param_groups"][0]["param_names"] = ["a", "b"]
    with pytest.raises(ValueError, match="3 parameters in param_groups, but 2 names"):
        dialect.import_state(state_dict, convert)


def test_parameters_of_unknown_shape_are_refused():
    state_dict = make_state_dict()
    del state_dict["state"][0], state_dict["state"][2]
    with pytest.raises(ValueError, match=r"'dense.weight' had no(.|\n)*'scale' had no"):
        dialect.import_state(state_dict, convert, list(NAMES))


def test_complex_state_of_timm_is_refused():
    state_dict = make_state_dict(TIMM)
    state_dict["state"][2]["square_avg"] = np.complex64(1)
    with pytest.raises(ValueError, match="'scale' is complex"):
        dialect.import_state(state_dict, convert, list(NAMES))


@pytest.mark.parametrize("rates", [[0.1], [0.1, -0.2, 0.3], [0.1, "0.2", 0.3]], ids=str)
def test_wrong_learning_rates_are_refused(rates):
    with pytest.raises(ValueError, match="learning_rate must be"):
        dialect.import_state(
            make_state_dict({}, {}, {}), convert, NAMES, learning_rate=rates
        )


CONVERT_DAMAGE = {
    "drops": (lambda a: {"a": a["dense.weight"], "b": a["scale"]}, "dense.bias"),
    "repeats": (lambda a: {**a, "tied": a["dense.bias"]}, "4 came back"),
    "cuts": (lambda a: {**a, "dense.bias": a["dense.bias"][:1]}, "1 came back"),
    "scales": (lambda a: {**a, "scale": 0.5 * a["scale"]}, "scale (float32[])"),
    "negates": (lambda a: {**a, "scale": -a["scale"]}, "were altered"),
    "pads": (lambda a: {**a, "scale": np.pad(a["dense.bias"], 1)}, "were altered"),
    "adds": (lambda a: {**a, "step": np.float32(0)}, "step (float32[])"),
    "rounds": (lambda a: {**a, "scale": np.float16(a["scale"])}, "or rounded"),
    "rounds in JAX": (
        lambda a: {**a, "scale": jnp.bfloat16(a["scale"])},
        "scale (float32[]) has elements that were not given, or were altered or",
    ),
    "truncates": (lambda a: {**a, "scale": np.int32(a["scale"])}, "(int32[])"),
    "returns objects": (lambda a: {**a, "scale": "x"}, "neither floating-point"),
    "looks for another name": (lambda a: a["weight"], "raised KeyError"),
    "joins groups": (
        lambda a: {
            "weight": a["dense.weight"],
            "rest": np.append(a["dense.bias"], a["scale"]),
        },
        "convert joins parameters of the groups [1, 2] in rest",
    ),
}


@pytest.mark.parametrize("name", CONVERT_DAMAGE)
def test_conversions_that_do_more_than_move_are_refused(name):
    function, message = CONVERT_DAMAGE[name]
    state_dict = make_state_dict({"lr": 1.0}, {"lr": 2.0}, {"lr": 3.0})
    with pytest.raises(ValueError, match=re.escape(message)):
        dialect.import_state(state_dict, function, NAMES)


def test_conversions_that_treat_slots_differently_are_refused():
    calls = []

    def fickle(arrays):
        calls.append(arrays)
        return arrays if len(calls) < 2 else list(arrays.values())

    with pytest.raises(ValueError, match="square_avg"):
        dialect.import_state(make_state_dict(), fickle, NAMES)


def export(options=None, back=convert_back, state=None, **changes):
    """Export a state with momentum onto a state dict with these changes."""
    state_dict = make_state_dict({"momentum": 0.9, **(options or {})})
    _, own = dialect.import_state(state_dict, convert, NAMES)
    like = make_state_dict({"momentum": 0.9, **(options or {}), **changes})
    return dialect.export_state(own if state is None else state, back, NAMES, like=like)


EXPORT_DAMAGE = {
    "no momentum wanted": (lambda: export(momentum=0), "'scale' is in param_groups[0]"),
    "momentum missing": (
        lambda: export({"momentum": 0}, momentum=0.9),
        "needs ['square_avg', 'momentum_buffer'], but the state has ['square_avg']",
    ),
    "mean missing": (lambda: export(centered=True), "centered True, which needs"),
    "mean not wanted": (
        lambda: export({"centered": True}, centered=False),
        "centered False, which needs",
    ),
    "rate in the momentum": (
        lambda: export(TIMM, lr_in_momentum=False),
        "the momentum of 'scale' has the learning rate as a factor",
    ),
    "rate not in the momentum": (
        lambda: export(**TIMM),
        "the momentum of 'scale' lacks the learning rate as a factor",
    ),
    "name missing": (
        lambda: export(back=lambda p: {"dense.weight": p["dense"]["kernel"]}),
        "convert_back must only move",
    ),
    "name renamed": (
        lambda: export(back=lambda p: rename(convert_back(p), "scale", "gain")),
        "returned no 'scale', which is in like\n- convert_back returned 'gain', which",
    ),
    "not transposed": (
        lambda: export(
            back=lambda p: {**convert_back(p), "dense.weight": p["dense"]["kernel"]}
        ),
        "'dense.weight' must be float32[2, 3] as in like, but convert_back returned "
        "float32[3, 2]",
    ),
    "no mapping": (lambda: export(back=jax.tree.leaves), "must return a mapping"),
    "another state": (
        lambda: export(state=optax.adam(0.1).init(NAMES)),
        "got ScaleByAdamState, EmptyState",
    ),
    "no count": (
        lambda: export(state=optax_rms.rmsprop(0.1).init(NAMES)),
        "got ScaleByRmsState, EmptyState, EmptyState",
    ),
    "bias correction": (
        lambda: export(
            state=optax_rms.rmsprop(
                optax.constant_schedule(0.1), bias_correction=True
            ).init(NAMES)
        ),
        "without bias_correction",
    ),
}


def rename(mapping, old, new):
    return {new if key == old else key: value for key, value in mapping.items()}


@pytest.mark.parametrize("name", EXPORT_DAMAGE)
def test_states_that_do_not_fit_are_not_exported(name):
    function, message = EXPORT_DAMAGE[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        function()


def test_a_momentum_of_zero_fits_everywhere():
    """The one state that is exact with the learning rate inside as well as outside."""
    tx = dialect.rmsprop_tf(momentum=0.9)
    params = convert(NAMES)
    state = tx.init(params)
    state = (state[0]._replace(nu=jax.tree.map(jnp.ones_like, params)), *state[1:])
    exported = export(state=state)
    assert float(exported["state"][2]["momentum_buffer"]) == 0


def test_export_behind_the_steps_of_like_is_refused():
    state_dict = make_state_dict(step=7)
    _, state = dialect.import_state(state_dict, convert, NAMES)
    like = make_state_dict(step=9)
    like["state"][1]["step"] = 1
    with pytest.raises(ValueError, match=r"'dense.bias' .* more steps"):
        dialect.export_state(state, convert_back, NAMES, like=like)


def test_export_without_shapes_is_refused():
    _, state = dialect.import_state(make_state_dict(), convert, NAMES)
    new = {"state": {}, "param_groups": make_state_dict()["param_groups"]}
    with pytest.raises(ValueError, match=r"'scale' has no state in like"):
        dialect.export_state(state, convert_back, list(NAMES), like=new)


def test_numbers_that_like_cannot_hold_are_not_exported():
    state_dict = make_state_dict()
    state_dict["state"][0]["square_avg"] = np.full((2, 3), 1e6, np.float32)
    _, state = dialect.import_state(state_dict, convert, NAMES)
    for stored in state_dict["state"].values():
        stored["square_avg"] = np.float16(np.minimum(stored["square_avg"], 1))
    with pytest.raises(ValueError, match=r"'dense.weight' is not finite in float16"):
        dialect.export_state(state, convert_back, NAMES, like=state_dict)


@pytest.mark.parametrize("option", ["capturable", "foreach", "differentiable"])
def test_options_without_meaning_are_rejected(option):
    with pytest.raises(ValueError, match=f"{option} must be .* here, got True. [UE]"):
        dialect.rmsprop(**{option: True})


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (dialect.rmsprop, {"lr": -1.0}, "lr must be"),
        (dialect.rmsprop, {"alpha": 2.0}, "alpha must be"),
        (dialect.rmsprop, {"eps": -1.0}, "eps must be"),
        (dialect.rmsprop, {"weight_decay": -1.0}, "weight_decay must be"),
        (dialect.rmsprop, {"momentum": 2.0}, "momentum must be"),
        (dialect.rmsprop_tf, {"foreach": False}, "foreach must be None"),
        (
            dialect.rmsprop_tf,
            {"corrected_weight_decay": True, "lr": 0.0},
            "max_lr_snapshot must be",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_wrong_arguments_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_schedule_with_corrected_decay_needs_its_highest_rate():
    with pytest.raises(ValueError, match=r"max_lr_snapshot .* schedule"):
        dialect.rmsprop_tf(lambda count: 0.1, corrected_weight_decay=True)


@pytest.mark.parametrize("decay", [{}, {"decoupled_decay": True}], ids=str)
def test_a_schedule_is_evaluated_once_per_step(decay):
    counts = []

    def schedule(count):
        counts.append(int(count))
        return 0.1

    tx = dialect.rmsprop_tf(schedule, weight_decay=0.1, **decay)
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    assert counts == [0, 1]


def test_init_takes_shapes_of_complex_parameters():
    tx = dialect.rmsprop(momentum=0.9, centered=True)
    params = {"real": jnp.ones(2), "complex": jnp.ones(2, jnp.complex64)}
    state = tx.init(jax.eval_shape(lambda: params))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    _, state = tx.update(params, state)
    chex.assert_tree_all_finite(state)


def test_decay_needs_the_parameters():
    params = jnp.ones(2)
    tx = dialect.rmsprop(weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("make", [dialect.rmsprop, dialect.rmsprop_tf])
def test_numbers_may_be_traced(make):
    """Injected, and mapped over, they give what the numbers give."""
    numbers = {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    numbers |= {"momentum": 0.5}
    params, g = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])

    def step(tx):
        state = tx.init(params)
        _, state = tx.update(g, state, params)
        return tx.update(g, state, params)[0]

    expected = step(make(**numbers))
    injected = step(optax.inject_hyperparams(make)(**numbers))
    mapped = jax.vmap(lambda **n: step(make(**n)))(
        **{name: jnp.full(3, number) for name, number in numbers.items()}
    )
    # Some ten roundings, in another order.
    np.testing.assert_allclose(injected, expected, rtol=1e-6)
    np.testing.assert_allclose(mapped, np.tile(expected, (3, 1)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_widened_before_the_decay_is_added(dtype):
    """In bfloat16 a decay of 1e-4 would be rounded away next to a gradient of 1."""
    params, g = jnp.ones(2, dtype), jnp.ones(2, dtype)
    tx = dialect.rmsprop(alpha=0.0, weight_decay=1e-4)
    updates, state = tx.update(g, tx.init(params), params)
    assert updates.dtype == dtype
    np.testing.assert_allclose(state[0].nu, 1.0001**2, rtol=1e-6)
