# SPDX-License-Identifier: Apache-2.0
"""`adapt_state`: every pair of configurations, and what checkpoints make of a state."""

import collections
import itertools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.trajectory import rounding_bound

import optax_rms
from optax_rms import UE6M2, adapt_state, compress_state, rmsprop, split_master_weights

STEPS = 3
PARAMS = {"w": jnp.ones(3), "b": [jnp.ones(()), None]}
GRADIENTS = [
    {"w": jnp.array([1.0, -2.0, 0.5]) * s, "b": [jnp.float32(s), None]}
    for s in (1.0, -0.3, 0.7)
]


def steady(count):
    return jnp.where(count < 10**6, 0.1, 0.0)


CONFIGURATIONS = {
    f"{average}, {momentum}, {rate}": {
        "learning_rate": 0.1 if rate == "number" else steady,
        "centered": "centered" in average,
        "bias_correction": "bias" in average,
        "momentum": None if momentum == "none" else 0.9,
        "lr_in_momentum": momentum != "outside",
    }
    for average, momentum, rate in itertools.product(
        ["plain", "bias", "centered", "centered bias"],
        ["none", "inside", "outside"],
        ["number", "schedule"],
    )
}


def run(tx, state=None):
    state = tx.init(PARAMS) if state is None else state
    for g in GRADIENTS:
        updates, state = tx.update(g, state)
    return updates, state


STATES = {name: run(rmsprop(**c))[1] for name, c in CONFIGURATIONS.items()}


def is_exact(own, other):
    """The pairs for which the numbers that the other needs are there."""
    if other["centered"] and not own["centered"]:
        return False  # The mean was never kept.
    # With bias correction, the mean is stored divided by 1 - decay^count.
    needed = other["centered"] and other["bias_correction"]
    if own["centered"] and own["bias_correction"] != needed:
        return False
    both = own["momentum"] is not None and other["momentum"] is not None
    return not both or own["lr_in_momentum"] == other["lr_in_momentum"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_pair(name):
    """What is converted is the state that the other would have; the rest is refused."""
    own = CONFIGURATIONS[name]
    for other_name, other in CONFIGURATIONS.items():
        like = rmsprop(**other).init(PARAMS)
        if not is_exact(own, other):
            with pytest.raises(ValueError, match="no exact conversion"):
                adapt_state(STATES[name], like, count=STEPS)
            continue
        adapted = adapt_state(STATES[name], like, count=STEPS)
        # The momentum is a sum of the steps that were taken, if any.
        zeros = optax.TraceState(jax.tree.map(jnp.zeros_like, PARAMS))
        traces = [part for part in STATES[name] if isinstance(part, optax.TraceState)]
        expected = tuple(
            (traces or [zeros])[0] if isinstance(part, optax.TraceState) else part
            for part in STATES[other_name]
        )
        bound = rounding_bound(np.float32, STEPS)
        chex.assert_trees_all_equal_shapes_and_dtypes(adapted, like)
        chex.assert_trees_all_close(adapted, expected, rtol=bound, atol=bound)
        run(rmsprop(**other), adapted)
        if own == other:
            chex.assert_trees_all_equal(adapted, STATES[name])


@pytest.mark.parametrize("name", ["plain, none, number", "plain, inside, number"])
def test_the_number_of_steps_is_asked_for(name):
    like = rmsprop(steady, momentum=0.9).init(PARAMS)
    with pytest.raises(ValueError, match=r"1 has no number of steps; pass count"):
        adapt_state(STATES[name], like)
    with pytest.raises(ValueError, match="count must be"):
        adapt_state(STATES[name], like, count=-1)
    # The count of the bias correction is the number of steps, too.
    biased = STATES[name.replace("plain", "bias")]
    assert adapt_state(biased, like)[1].count == STEPS


def test_a_momentum_of_zero_fits_everywhere():
    inside = rmsprop(0.1, momentum=0.9)
    outside = rmsprop(0.1, momentum=0.9, lr_in_momentum=False)
    adapted = adapt_state(inside.init(PARAMS), outside.init(PARAMS))
    chex.assert_trees_all_equal(adapted, outside.init(PARAMS))
    with pytest.raises(ValueError, match="momentum with the learning rates inside"):
        jax.jit(lambda s: adapt_state(s, outside.init(PARAMS)))(inside.init(PARAMS))


TRANSFORMATIONS = {
    "plain": rmsprop(0.1),
    "all": rmsprop(steady, centered=True, momentum=0.9, bias_correction=True),
    "chain": optax.chain(optax.clip(1.0), rmsprop(steady, momentum=0.9)),
    "multi_steps": optax.MultiSteps(rmsprop(steady), 2).gradient_transformation(),
    "inject": optax.inject_hyperparams(rmsprop)(learning_rate=0.1, momentum=0.9),
    "adam": optax.adam(steady),
    "compressed": compress_state(rmsprop(steady), nu=UE6M2),
    "keras": optax_rms.dialects.keras.rmsprop(0.1, momentum=0.9, use_ema=True),
    "split": split_master_weights(rmsprop(steady)),
}


def as_lists(node):
    """Sequences as lists, as JSON and YAML have them."""
    if isinstance(node, dict):
        return {k: as_lists(v) for k, v in node.items()}
    return [as_lists(v) for v in node] if isinstance(node, tuple | list) else node


CHECKPOINTS = {
    "lists": as_lists,
    "flax state dict": flax.serialization.to_state_dict,
    "flax msgpack": lambda s: flax.serialization.msgpack_restore(
        flax.serialization.to_bytes(s)
    ),
    "numpy": lambda s: jax.tree.map(np.asarray, s),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_checkpoints_return(name, kind):
    tx = TRANSFORMATIONS[name]
    params = {"w": jnp.ones(3), "b": [jnp.ones(())]}
    gradients = jax.tree.map(lambda p: 0.3 * p, params)
    with jax.numpy_dtype_promotion("standard"):  # Some of Optax asks for it.
        _, state = tx.update(gradients, tx.init(params), params)
    like = jax.eval_shape(tx.init, params)
    adapted = adapt_state(CHECKPOINTS[kind](state), like)
    chex.assert_trees_all_equal_structs(adapted, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(adapted, state)
    chex.assert_trees_all_equal(adapted, state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(adapted))


def test_classes_that_look_alike():
    """As after a pickle of another version, whose classes are not the same objects."""
    theirs = collections.namedtuple("ScaleByRmsState", ["nu"])
    nothing = collections.namedtuple("EmptyState", [])
    state = STATES["plain, none, number"]
    like = TRANSFORMATIONS["plain"].init(PARAMS)
    adapted = adapt_state((theirs(state[0].nu), nothing(), nothing()), like)
    chex.assert_trees_all_equal_structs(adapted, state)
    chex.assert_trees_all_equal(adapted, state)


def test_half_precision_becomes_float32_and_not_the_other_way():
    wide, narrow = rmsprop(0.1), rmsprop(0.1, accumulator_dtype="bfloat16")
    _, state = run(narrow)
    adapted = adapt_state(state, wide.init(PARAMS))
    assert adapted[0].nu["w"].dtype == jnp.float32
    chex.assert_trees_all_equal(adapted[0].nu["w"], state[0].nu["w"].astype("float32"))
    with pytest.raises(ValueError, match=r"0\.nu\.w is float32, which bfloat16 cannot"):
        adapt_state(STATES["plain, none, number"], narrow.init(PARAMS))


def test_everything_wrong_is_in_one_message():
    like = rmsprop(0.1).init(
        {"w": jnp.ones(4), "b": [jnp.ones(()), None], "c": jnp.ones(1)}
    )
    state = STATES["plain, none, number"]
    with pytest.raises(ValueError, match="no exact conversion") as error:
        adapt_state((state[0]._replace(nu={"w": jnp.ones(3)}), *state[1:]), like)
    assert "0.nu lacks b, c, and has w" in str(error.value)
    bigger = rmsprop(0.1).init({"w": jnp.ones(4), "b": [jnp.ones((1,)), None]})
    with pytest.raises(
        ValueError, match=r"must be float32\[4\], got float32\[3\]"
    ) as e:
        adapt_state(state, bigger)
    assert "0.nu.b.0 must be float32[1], got float32[]" in str(e.value)
    with pytest.raises(ValueError, match=r"0\.nu has b, for which like has no place"):
        adapt_state(state, rmsprop(0.1).init({"w": jnp.ones(3)}))


@pytest.mark.parametrize(
    ("state", "like", "message"),
    [
        (TRANSFORMATIONS["plain"], TRANSFORMATIONS["compressed"], "recompress_state"),
        (TRANSFORMATIONS["compressed"], TRANSFORMATIONS["plain"], "decompress_state"),
        (
            TRANSFORMATIONS["compressed"],
            compress_state(rmsprop(steady), nu=optax_rms.UE8M8),
            "UE8M8.*recompress_state",
        ),
        (TRANSFORMATIONS["split"], rmsprop(steady), "master_weights"),
        (
            optax.rmsprop(0.1, centered=True),
            rmsprop(0.1, centered=True),
            "import_state",
        ),
        (optax.adam(0.1), rmsprop(0.1), "lacks"),
        (optax.sgd(0.1), rmsprop(0.1), "lacks"),
    ],
)
def test_refused_with_what_to_do(state, like, message):
    with pytest.raises(ValueError, match=message):
        adapt_state(state.init(PARAMS), like.init(PARAMS), count=0)
