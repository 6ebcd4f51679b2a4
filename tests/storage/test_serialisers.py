# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of compressed and split states: read, or refused, and never mixed."""

import dataclasses
import pathlib
import pickle
import re

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers.on_request import first_by_default

from optax_rms import (
    SE5M2,
    UE6M2,
    UE8M8,
    CompressState,
    MasterWeightsState,
    compress_state,
    count_extremes,
    decompress_state,
    master_weights,
    recompress_state,
    split_master_weights,
)

PARAMS = {"b": jnp.linspace(-1.0, 1.0, 5), "w": jnp.ones((4, 3))}
INNER = optax.rmsprop(0.1, momentum=0.9)
HIGHER = dataclasses.replace(UE6M2, lowest_exponent=-32)
DOCS = pathlib.Path(__file__).parents[2] / "docs"


def equinox_leaves(state, path):
    """Equinox, `eqx.tree_serialise_leaves`"""
    eqx.tree_serialise_leaves(path, state)
    return lambda like: eqx.tree_deserialise_leaves(path, like)


def orbax(state, path):
    """Orbax"""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)

    def restore(like):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, like)

    return restore


def orbax_partial_restore(state, path):
    """Orbax with `partial_restore=True`"""
    orbax(state, path)

    def restore(like):
        args = ocp.checkpoint_utils.construct_restore_args(like)
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    like, restore_args=args, partial_restore=True
                ),
            )

    return restore


def flax_serialization(state, path):
    """`flax.serialization`"""
    path.write_bytes(flax.serialization.to_bytes(state))
    return lambda like: flax.serialization.from_bytes(like, path.read_bytes())


def nnx_pure_dict(state, path):
    """pure dicts of `nnx.Optimizer`"""

    def optimizer_with(state):
        tx = optax.GradientTransformation(lambda params: state, lambda *_: _)
        return nnx.Optimizer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)

    pure = nnx.to_pure_dict(nnx.state(optimizer_with(state)))
    path.write_bytes(pickle.dumps(jax.tree.map(np.asarray, pure)))

    def restore(like):
        optimizer = optimizer_with(like)
        filled = nnx.state(optimizer)
        nnx.replace_by_pure_dict(filled, pickle.loads(path.read_bytes()))
        nnx.update(optimizer, filled)
        return jax.tree.map(
            lambda variable: variable[...],
            optimizer.opt_state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )

    return restore


def savez_of_leaves(state, path):
    """`np.savez` of the leaves"""
    path = path.with_suffix(".npz")
    np.savez(path, *jax.tree.leaves(state))

    def restore(like):
        with np.load(path) as arrays:
            leaves = [arrays[name] for name in arrays]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    return restore


def pickled(state, path):
    """`pickle`"""
    path.write_bytes(pickle.dumps(state))
    return lambda like: pickle.loads(path.read_bytes())


# For each serialiser: a state of other formats, an uncompressed state loaded into a
# compressed one, and a compressed state loaded into an uncompressed one.
LOAD, UPDATE = "error in loading", "error in `update`"
OUTCOMES = {
    equinox_leaves: (UPDATE, LOAD, LOAD),
    orbax: (LOAD, LOAD, LOAD),
    orbax_partial_restore: (UPDATE, LOAD, LOAD),
    flax_serialization: (LOAD, LOAD, LOAD),
    nnx_pure_dict: (UPDATE, LOAD, LOAD),
    savez_of_leaves: (UPDATE, LOAD, LOAD),
    pickled: (UPDATE, UPDATE, UPDATE),
}
over_serialisers = pytest.mark.parametrize("save", OUTCOMES, ids=lambda f: f.__name__)
OTHER_FORMATS = {
    "window": (UE6M2, HIGHER),
    "decay": (UE6M2, dataclasses.replace(UE6M2, decay=0.9)),
    "same bytes": (UE8M8, dataclasses.replace(UE8M8, lowest_exponent=-100)),
}


def trained(tx):
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    return state


def outcome(restore, tx, saved):
    """What becomes of a saved state in the hands of ``tx``."""
    fresh = tx.init(PARAMS)
    try:
        state = restore(fresh)
    except (ValueError, TypeError, KeyError, RuntimeError):
        return LOAD
    try:
        tx.update(PARAMS, state, PARAMS)
    except (ValueError, TypeError, AttributeError):
        return UPDATE
    same = jax.tree.structure(saved) == jax.tree.structure(state) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(saved), jax.tree.leaves(state), strict=True)
    )
    return "as saved" if same else "mixed"


@over_serialisers
def test_the_same_formats_resume_bit_for_bit(save, tmp_path):
    tx = compress_state(INNER, nu=UE6M2, trace=SE5M2)
    state = trained(tx)
    restored = save(state, tmp_path / "state")(tx.init(PARAMS))
    assert outcome(lambda like: restored, tx, state) == "as saved"
    expected = tx.update(PARAMS, state, PARAMS)
    for x, y in zip(
        jax.tree.leaves(tx.update(PARAMS, restored, PARAMS)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("formats", OTHER_FORMATS.values(), ids=OTHER_FORMATS)
@over_serialisers
def test_other_formats_are_refused(save, formats, tmp_path):
    before, after = (compress_state(INNER, nu=format) for format in formats)
    state = trained(before)
    restore = save(state, tmp_path / "state")
    assert outcome(restore, after, state) == OUTCOMES[save][0]


@over_serialisers
def test_compressed_and_uncompressed_states_are_not_mixed(save, tmp_path):
    compressed = compress_state(INNER, nu=UE6M2)
    pairs = (INNER, compressed), (compressed, INNER)
    for (before, after), expected in zip(pairs, OUTCOMES[save][1:], strict=True):
        state = trained(before)
        restore = save(state, tmp_path / f"from {expected} {before is INNER}")
        assert outcome(restore, after, state) == expected


def test_the_table_in_the_docs_is_the_one_of_the_tests():
    text = (DOCS / "compressed_checkpoints.md").read_text()
    for save, outcomes in OUTCOMES.items():
        assert f"| {save.__doc__} | as saved | {' | '.join(outcomes)} |" in text


def mixed_state(inner):
    """A state whose codes are of another window than its structure names."""
    state = trained(compress_state(inner, nu=UE6M2))
    like = compress_state(inner, nu=HIGHER).init(PARAMS)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(state))


def test_every_eager_reader_refuses_codes_of_other_formats():
    tx, state = compress_state(INNER, nu=HIGHER), mixed_state(INNER)
    plain = INNER.init(PARAMS)
    for read in (
        lambda: tx.update(PARAMS, state, PARAMS),
        lambda: decompress_state(state),
        lambda: recompress_state(state, plain),
        lambda: count_extremes(state),
        lambda: optax.chain(tx).update(PARAMS, (state,), PARAMS),
        lambda: tx.update(PARAMS, state._replace(formats=None), PARAMS),
        lambda: decompress_state({"opt": (state,)}),
    ):
        with pytest.raises(ValueError, match=r"formats nu=UE6M2@-32, but .* other"):
            read()


COMPILED = {
    "jit": lambda tx: jax.jit(tx.update),
    "vmap": lambda tx: (
        lambda *args: jax.tree.map(
            lambda x: x[0],
            jax.vmap(tx.update)(*jax.tree.map(lambda x: jnp.stack([x, x]), args)),
        )
    ),
    "scan": lambda tx: (
        lambda g, state, p: jax.lax.scan(
            lambda state, _: tx.update(g, state, p)[::-1], state, length=2
        )[::-1]
    ),
}


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize(
    "inner",
    first_by_default(
        [
            INNER,
            optax.adam(0.1),
            optax.inject_hyperparams(optax.rmsprop)(learning_rate=0.1),
            optax.MultiSteps(optax.adam(0.1), 1).gradient_transformation(),
            optax.partition({"all": optax.adam(0.1)}, lambda p: "all"),
        ]
    ),
    ids=["rmsprop", "adam", "inject_hyperparams", "MultiSteps", "partition"],
)
def test_codes_of_other_formats_are_nan_when_compiled(inner, way):
    """Nothing can be raised there, so the numbers must show it, in every later step."""
    with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction needs it.
        tx = compress_state(inner, nu=HIGHER)
        step = COMPILED[way](tx)
        good = trained(tx)
        for state, finite in ((good, True), (mixed_state(inner), False)):
            for _ in range(2):
                updates, state = step(PARAMS, state, PARAMS)
                for leaf in jax.tree.leaves(updates):
                    assert np.all(np.isfinite(leaf) == finite)


def test_compiled_readers_cannot_mistake_codes_of_other_formats():
    state = mixed_state(INNER)
    for leaf in jax.tree.leaves(optax.tree.get(jax.jit(decompress_state)(state), "nu")):
        assert np.all(np.isnan(leaf))
    counts = jax.jit(count_extremes)(state)["nu"]
    assert counts == (17, 17, 17)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("save", [equinox_leaves, orbax, orbax_partial_restore])
def test_residuals_of_other_bits_are_refused(save, bits, tmp_path):
    """Orbax casts them: int8 to int16, 256 times too small, and back, cut off."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    before = split_master_weights(optax.sgd(0.1), bits)
    after = split_master_weights(optax.sgd(0.1), 24 - bits)
    _, state = before.update(params, before.init(params), params)
    restore = save(state, tmp_path / "state")
    with pytest.raises((ValueError, RuntimeError), match=r"formats|shape|dtype"):
        after.update(params, restore(after.init(params)), params)


def test_residuals_of_other_weights_are_refused():
    """A residual counts parts of the spacing of bfloat16, which is not float16's."""
    tx = split_master_weights(optax.sgd(0.1))
    bfloat16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    float16 = jax.tree.map(lambda p: p.astype(jnp.float16), PARAMS)
    state = tx.init(bfloat16)
    message = r"formats 8 bits of float16, but .* master_weights and split_weights"
    with pytest.raises(ValueError, match=message):
        tx.update(float16, state, float16)
    with pytest.raises(ValueError, match=message):
        master_weights(float16, state)
    updates, _ = jax.jit(tx.update)(float16, state, float16)
    masters = jax.jit(master_weights)(float16, state)
    for leaf in jax.tree.leaves((updates, masters)):
        assert np.all(np.isnan(leaf))


def compressed_as_in_version_0_1(state):
    return CompressState(state.rounding_step, state.fields, state.inner_state)


def pickle_of_version_0_1(state, folder):
    """Through a file that names the modules of then, read as the page says."""
    pickled = pickle.dumps(state, protocol=0)
    assert b"optax_rms.storage._compress_state" in pickled
    path = folder / "state.pickle"
    path.write_bytes(pickled.replace(b"optax_rms.storage._", b"optax_rms._"))
    with pytest.raises(ModuleNotFoundError, match=r"optax_rms\._compress_state"):
        pickle.loads(path.read_bytes())
    text = (DOCS / "files_of_version_0_1.md").read_text()
    (code,) = re.findall(r"^```python\n(import pickle.*?)^```", text, re.M | re.S)
    names = {}
    exec(code, names)
    return names["load"](path)


def test_pickles_of_version_0_1_go_on_with_the_same_bits(tmp_path):
    tx = compress_state(INNER, nu=UE6M2)
    state = trained(tx)
    old = pickle_of_version_0_1(compressed_as_in_version_0_1(state), tmp_path)
    expected, _ = tx.update(PARAMS, state, PARAMS)
    body = lambda state, _: tx.update(PARAMS, state, PARAMS)[::-1]  # noqa: E731
    _, updates = jax.lax.scan(body, old, length=1)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x[0], y, rtol=1e-6)
    assert count_extremes(old) == count_extremes(state)
    with pytest.raises(ValueError, match=r"\['nu=UE6M2@-46'\]"):
        compress_state(INNER, nu=HIGHER).update(PARAMS, old, PARAMS)
    # The present layout, for whoever wants the check of formats.
    fresh = recompress_state(tx.init(PARAMS), decompress_state(old))
    np.testing.assert_array_equal(
        fresh.inner_state[0].nu["w"], state.inner_state[0].nu["w"]
    )

    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = split_master_weights(optax.sgd(0.1))
    _, state = tx.update(params, tx.init(params), params)
    old = pickle.loads(pickle.dumps(MasterWeightsState(*state[:3])))
    for x, y in zip(
        jax.tree.leaves(tx.update(params, old, params)[0]),
        jax.tree.leaves(tx.update(params, state, params)[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("save", [orbax, orbax_partial_restore, flax_serialization])
def test_other_files_of_version_0_1_are_refused_by_the_name_formats(save, tmp_path):
    tx = compress_state(INNER, nu=UE6M2)
    state = trained(tx)
    old = compressed_as_in_version_0_1(state)._asdict()
    del old["fields"], old["rounding_seed"]
    restore = save(old, tmp_path / "state")
    for format in (UE6M2, HIGHER):
        with pytest.raises((ValueError, TypeError), match="formats"):
            restore(compress_state(INNER, nu=format).init(PARAMS))
    # The way in the docs.
    fresh = tx.init(PARAMS)
    names = ("rounding_step", "formats", "inner_state")
    parts = (fresh.rounding_step, fresh.fields, fresh.inner_state)
    restored = restore(dict(zip(names, parts, strict=True)))
    del restored["formats"]
    assert outcome(lambda like: fresh._replace(**restored), tx, state) == "as saved"


def test_the_check_costs_nothing_in_a_compiled_step():
    """A scalar comparison, and a choice within the loops that decode anyway."""
    shape = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    tx = compress_state(optax.adam(0.1), nu=UE6M2, mu=SE5M2)
    checked = jax.eval_shape(tx.init, shape)

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state

    def compiled(state):
        with jax.numpy_dtype_promotion("standard"):
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(shape, state, shape)
        return lowered.compile()

    new, old = map(compiled, (checked, compressed_as_in_version_0_1(checked)))
    bytes_new, bytes_old = (c.cost_analysis()["bytes accessed"] for c in (new, old))
    assert 0 < bytes_new <= bytes_old + 100
    memory = [c.memory_analysis().temp_size_in_bytes for c in (new, old)]
    assert memory[0] <= memory[1] + 100
    # As many loops over whole arrays.
    loops = [
        sum(
            "512,512" in line and " fusion(" in line for line in c.as_text().split("\n")
        )
        for c in (new, old)
    ]
    assert loops[0] == loops[1] > 0
