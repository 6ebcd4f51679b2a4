# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that tf.keras and Keras 3 wrote on TensorFlow, imported and exported.

record_saved_files.py records them. Each run is saved after 25 steps, and the import is
proved by the steps 26 to 50, on the recorded gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tensorflow_files as files
from helpers.on_request import first_by_default
from helpers.reference import relative_error

from optax_rms import dialects

# The worst difference that counts as agreement, relative to the length of the path:
# 25 steps of three roundings per average, and ten between gradient and update, are
# 160 times the 6e-8 of float32. The least that counts as disagreement is far from it.
BOUND = 2e-5
REJECTED = 100 * BOUND

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# By Keras' names: the slots in the order of its variables, and their argument.
KERAS_SLOTS = {
    "average": "use_ema",
    "velocity": None,
    "momentum": "momentum",
    "average_gradient": "centered",
}
KERAS_FIELDS = {"velocity": "rms", "average_gradient": "mg", "momentum": "momentum"}


def keys_of(run, model="model/"):
    """The names of the trained variables in a checkpoint, by those of the model."""
    if files.RUNS[run]["family"] == "keras3":
        places = [f"optimizer/_trainable_variables/{i}" for i in range(4)]
    else:
        places = [
            f"{model}layer_with_weights-{layer}/{weight}"
            for layer in (0, 1)
            for weight in ("kernel", "bias")
        ]
    return dict(zip(files.SHAPES, [place + VALUE for place in places], strict=True))


def converter(keys):
    return lambda arrays: {name: arrays[key] for name, key in keys.items()}


def back(keys):
    return lambda tree: {key: tree[name] for name, key in keys.items()}


def arguments_of(run):
    """The arguments that no checkpoint holds, as whoever imports has to give them."""
    description = files.RUNS[run]
    given = {k: v for k, v in description["arguments"].items() if k != "name"}
    if given.pop("learning_rate", None):
        given["learning_rate"] = optax.exponential_decay(1e-2, 10, 0.5)
    if description["family"] == "legacy":
        # Stored in the checkpoint, which is the point.
        for stored in ("rho", "momentum", "decay"):
            given.pop(stored, None)
    return given


def import_run(run, variables=None, model="model/", names=None, **changes):
    variables = files.checkpoint(run) if variables is None else variables
    return dialects.tensorflow.import_state(
        variables,
        converter(keys_of(run, model)),
        names,
        **arguments_of(run) | changes,
    )


def start_of(run):
    variables = files.checkpoint(run)
    return {name: jnp.asarray(variables[key]) for name, key in keys_of(run).items()}


def continue_run(tx, params, state):
    """The parameters after each of the steps 26 to 50, as rows, and the last state."""

    @jax.jit
    def scan(carry, gradients):
        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, carry, gradients)

    gradients = jax.tree.map(jnp.asarray, files.gradients())
    (_, state), trajectory = scan((params, state), gradients)
    return trajectory, state


def error_of(run, trajectory):
    """The worst difference from the recorded parameters, relative to their path."""
    start, expected = start_of(run), files.trajectory(run)
    return max(
        relative_error(
            np.float64(trajectory[name]) - np.float64(start[name]),
            np.float64(expected[name]) - np.float64(start[name]),
        )
        for name in files.SHAPES
    )


def slot_keys(run):
    """The names of a run's slots in its checkpoint, by slot and variable."""
    description = files.RUNS[run]
    arguments, keys = description["arguments"], keys_of(run)
    if description["family"] == "legacy":
        uses = {"rms": None, "momentum": "momentum", "mg": "centered"}
        return {
            slot: {
                name: key.replace(VALUE, f"/.OPTIMIZER_SLOT/optimizer/{slot}{VALUE}")
                for name, key in keys.items()
            }
            for slot, argument in uses.items()
            if argument is None or arguments.get(argument)
        }
    is_keras3 = description["family"] == "keras3"
    prefix = "optimizer/_variables/"
    if is_keras3 and description["loss_scale"]:
        prefix = "optimizer/inner_optimizer/_variables/"
    slots = [s for s, use in KERAS_SLOTS.items() if use is None or arguments.get(use)]
    numbers = iter(range(2 if is_keras3 else 1, 100))
    return {
        slot: {name: f"{prefix}{next(numbers)}{VALUE}" for name in keys}
        for slot in slots
    }


def assert_slots_agree(run, arrays, expected):
    """Compare each slot with its own scale: a mean with the root of its square."""
    keys = slot_keys(run)
    squares = keys["rms" if "rms" in keys else "velocity"]
    for slot, names in keys.items():
        for name, key in names.items():
            wide, square = np.float64(expected[key]), expected[squares[name]]
            scale = {
                "rms": square,
                "velocity": square,
                "mg": np.sqrt(square),
                "average_gradient": np.sqrt(square),
            }.get(slot, np.max(np.abs(wide)))
            difference = np.abs(np.float64(arrays[key]) - wide)
            assert np.all(difference <= BOUND * scale), (slot, name)


def counts_steps(run):
    """Whether the state has a count: a Keras state always, others for a schedule."""
    description = files.RUNS[run]
    has_schedule = {"learning_rate", "decay"} & description["arguments"].keys()
    return description["family"] != "legacy" or bool(has_schedule)


@pytest.mark.parametrize("run", files.RUNS)
def test_a_run_continues_and_goes_back(run):
    tx, state = import_run(run)
    trajectory, state = continue_run(tx, start_of(run), state)
    assert error_of(run, trajectory) <= BOUND

    like, last = files.checkpoint(run), files.checkpoint(run, "last")
    exported = dialects.tensorflow.export_state(state, back(keys_of(run)), like)
    assert_slots_agree(run, exported, last)
    slots = {key for names in slot_keys(run).values() for key in names.values()}
    scalars = {key.split("/")[-3]: exported[key] for key in exported.keys() - slots}
    count = {"legacy": "iter"}.get(files.RUNS[run]["family"], "_iterations")
    assert counts_steps(run) == (count in scalars)
    assert scalars.pop(count, 50) == 50
    # In Keras 3, the learning rate is one of the variables of the optimizer.
    assert scalars.keys() == ({"_learning_rate"} if run.startswith("keras3") else set())
    for key, array in exported.items():
        assert (array.dtype, array.shape) == (last[key].dtype, last[key].shape)


@pytest.mark.parametrize("run", files.RUNS)
def test_export_after_import_changes_no_bit(run):
    like = files.checkpoint(run)
    _, state = import_run(run)
    exported = dialects.tensorflow.export_state(state, back(keys_of(run)), like)
    _, again = import_run(run, like | exported)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    # The order is that of the optimizer's variables, where TensorFlow numbers them.
    if files.RUNS[run]["family"] != "legacy":
        numbers = [key.split("/")[-3] for key in exported]
        assert numbers == sorted(numbers, key=lambda n: int(n) if n.isdigit() else -1)


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (run, kind)
        for run, description in files.RUNS.items()
        for kind in description["checkpoints"]
        if kind in ("weights", "saved_model")
    ],
)
def test_every_way_to_a_checkpoint(run, kind):
    _, expected = import_run(run)
    _, state = import_run(run, files.checkpoint(run, kind), model="")
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("run", ["new_everything", "legacy_momentum", "new_loss_scale"])
def test_one_of_two_optimizers(run):
    """Variables of both models have the same names: their order must be given."""
    _, expected = import_run(run)
    pair = files.checkpoint(run, "pair")
    names = list(keys_of(run, "actor/").values())
    _, state = import_run(run, pair, "actor/", names, optimizer="actor_optimizer")
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    with pytest.raises(ValueError, match=r"one of \['actor_optimizer', 'critic_opt"):
        import_run(run, pair, "actor/", names)
    if run.startswith("new"):
        with pytest.raises(ValueError, match=r"names must be .* same name"):
            import_run(run, pair, "actor/", optimizer="actor_optimizer")


@pytest.mark.parametrize("run", ["new_everything", "keras3_everything"])
def test_without_the_object_graph_the_order_of_names_counts(run):
    variables = {k: v for k, v in files.checkpoint(run).items() if k != GRAPH}
    names = list(keys_of(run).values())
    _, expected = import_run(run)
    _, state = import_run(run, variables, names=names)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    # With the graph, any order will do; without it, shapes cannot tell all.
    _, state = import_run(run, names=names[::-1])
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    swapped = [names[i] for i in (2, 3, 0, 1)]
    tx, state = import_run(run, variables, names=swapped)
    assert error_of(run, continue_run(tx, start_of(run), state)[0]) >= REJECTED
    with pytest.raises(ValueError, match="must be float32"):
        import_run(run, variables, names=names[::-1])
    with pytest.raises(ValueError, match=r"names must be .* no object graph"):
        import_run(run, variables)


NEIGHBOURS = {
    "rho": 0.94,
    "momentum": 0.79,
    "epsilon": 2e-3,
    "weight_decay": 0.11,
    "global_clipnorm": 1.9,
    "ema_momentum": 0.89,
    "ema_overwrite_frequency": 11,
    "learning_rate": 0.0101,
    "step": 24,
}


@pytest.mark.parametrize("argument", first_by_default(NEIGHBOURS, 2))
def test_the_data_reject_every_other_argument(argument):
    changes = {argument: NEIGHBOURS[argument]}
    tx, state = import_run("new_everything", **changes)
    trajectory, _ = continue_run(tx, start_of("new_everything"), state)
    assert error_of("new_everything", trajectory) >= REJECTED


def test_the_configuration_of_tf_keras_may_be_given_whole():
    run = "new_everything"
    config = files.RUNS[run]["config"]
    tx, state = dialects.tensorflow.import_state(
        files.checkpoint(run), converter(keys_of(run)), **config
    )
    trajectory, _ = continue_run(tx, start_of(run), state)
    assert error_of(run, trajectory) <= BOUND


def test_arguments_replace_stored_numbers():
    tx, state = import_run("new", learning_rate=0.5, step=3)
    assert state.count == 3
    ones = jax.tree.map(jnp.ones_like, start_of("new"))
    updates, _ = tx.update(ones, state)
    expected, _ = dialects.keras.rmsprop(0.5).update(ones, state)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_some_parameters_may_be_excluded_from_decay():
    mask = {name: name.endswith("bias") for name in files.SHAPES}
    tx, state = import_run("new_everything", exclude_from_weight_decay=mask)
    plain, _ = import_run("new_everything")
    params = start_of("new_everything")
    zeros = jax.tree.map(jnp.zeros_like, params)
    ours: Any = tx.update(zeros, state, params)[0]
    theirs: Any = plain.update(zeros, state, params)[0]
    for name, is_excluded in mask.items():
        assert np.array_equal(ours[name], theirs[name]) == (not is_excluded)


def renumbered(old, new):
    def change(variables):
        names = (f"optimizer/_variables/{n}{VALUE}" for n in (old, new))
        before, after = names
        return {after if k == before else k: v for k, v in variables.items()}

    return change


def without(*names):
    return lambda variables: {
        k: v for k, v in variables.items() if k.removesuffix(VALUE) not in names
    }


DAMAGE = {
    "a rule of TensorFlow 1": (
        "new",
        {"dialect": dialects.tensorflow.rmsprop},
        dict,
        r"dialect must be dialects.keras.rmsprop, because optimizer is .* 2.11 on",
    ),
    "a rule of legacy Keras": (
        "new",
        {"dialect": dialects.tensorflow.legacy_keras_rmsprop},
        dict,
        "dialect must be dialects.keras.rmsprop",
    ),
    "the new rule for legacy Keras": (
        "legacy",
        {"dialect": dialects.keras.rmsprop},
        dict,
        "dialect must be legacy_keras_rmsprop, because .* before 2.11",
    ),
    "TensorFlow 1's rule for legacy Keras": (
        "legacy",
        {"dialect": dialects.tensorflow.rmsprop},
        dict,
        "dialect must be legacy_keras_rmsprop",
    ),
    "momentum that is not stored": (
        "new",
        {"momentum": 0.9},
        dict,
        r"slots \['velocity'\], and the arguments need \['velocity', 'momentum'\]",
    ),
    "momentum that is not used": ("new_loss_scale", {"momentum": 0.0}, dict, "agree"),
    "momentum that is not used, without names": (
        "new_loss_scale",
        {"momentum": 0.0, "names": list(keys_of("new_loss_scale").values())},
        without(GRAPH),
        "there are 10 variables, but 6 belong",
    ),
    "a schedule": (
        "new_schedule",
        {"learning_rate": None},
        dict,
        "learning_rate was a schedule, which is not stored",
    ),
    "a legacy schedule": (
        "legacy_schedule",
        {"learning_rate": None},
        dict,
        "learning_rate was a schedule, which is not stored",
    ),
    "no frequency": (
        "new_everything",
        {"ema_overwrite_frequency": "missing"},
        dict,
        "ema_overwrite_frequency is not stored; .* tf.keras is 100",
    ),
    "a variable too few": (
        "new",
        {},
        without("optimizer/_variables/2"),
        r"numbered from 1 on.* got the numbers \[1, 3, 4\]",
    ),
    "no iteration": ("new", {}, without("optimizer/_iterations"), "_iterations"),
    "swapped slots": (
        "new",
        {"names": list(keys_of("new").values())[::-1]},
        without(GRAPH),
        r"must be float32\[2\], got float32\[2, 2\]",
    ),
    "names of others": ("new", {"names": ["a"]}, dict, "names must be the trained"),
    "a damaged graph": (
        "new",
        {},
        lambda v: v | {GRAPH: b"\xff" * 20},
        f"{GRAPH} is damaged",
    ),
    "no graph but a text": ("new", {}, lambda v: v | {GRAPH: "no"}, "is damaged"),
    "a negative square": (
        "new",
        {},
        lambda v: v | {"optimizer/_variables/2" + VALUE: np.full(2, -1.0, np.float32)},
        "bias.*must not be negative",
    ),
    "half a step": ("new", {"step": 0.5}, dict, "step must be a whole number"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_refused(kind):
    run, changes, damage, message = DAMAGE[kind]
    arguments = arguments_of(run) | changes
    missing = [k for k, v in arguments.items() if v is None or isinstance(v, str)]
    for name in missing:
        del arguments[name]
    with pytest.raises(ValueError, match=message):
        dialects.tensorflow.import_state(
            damage(files.checkpoint(run)), converter(keys_of(run)), **arguments
        )


def test_tensorflow_1_needs_a_learning_rate():
    variables = {"w": np.zeros(2, np.float32), "w/RMSProp": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="learning_rate is not stored in the checkp"):
        dialects.tensorflow.import_state(variables, dict)


def test_export_refuses_the_optimizer_of_another_rule():
    _, old = import_run("legacy")
    _, new = import_run("new")
    keys = back(keys_of("new"))
    with pytest.raises(ValueError, match=r"only continue a state of dialects\.keras"):
        dialects.tensorflow.export_state(old, keys, files.checkpoint("new"))
    with pytest.raises(
        ValueError, match=r"like must have an optimizer of tf\.keras from"
    ):
        dialects.tensorflow.export_state(new, keys, files.checkpoint("legacy"))
    with pytest.raises(ValueError, match="the arguments need"):
        dialects.tensorflow.export_state(new, keys, files.checkpoint("new_loss_scale"))
