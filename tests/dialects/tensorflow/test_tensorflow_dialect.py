# SPDX-License-Identifier: Apache-2.0
"""`dialects.tensorflow`: its arguments, and every way in which a checkpoint can be bad.

That the numbers are those of TensorFlow is tested in test_tensorflow_parity.py.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_rms
from optax_rms.dialects import tensorflow, torch

SLOT = "model/kernel/.OPTIMIZER_SLOT/optimizer/{}/.ATTRIBUTES/VARIABLE_VALUE"
KERNEL = "model/kernel/.ATTRIBUTES/VARIABLE_VALUE"
HYPER = "optimizer/{}/.ATTRIBUTES/VARIABLE_VALUE"


def full(value, shape=(2, 3), dtype=np.float32):
    return np.full(shape, value, dtype)


def graph(centered=False):
    """A checkpoint of ``Saver``: two variables, slots of the mean 1 and square 4."""
    variables = {"global_step": np.array(10), "moving_mean": full(0)}
    for name, shape in (("dense/kernel", (2, 3)), ("dense/bias", (3,))):
        slots = {"": 0, "/RMSProp": 4, "/RMSProp_1": 0.5}
        if centered:
            slots |= {"/RMSProp_1": 1, "/RMSProp_2": 0.5}
        for slot, value in slots.items():
            variables[name + slot] = full(value, shape)
    return variables


def legacy(**changes):
    """A checkpoint of ``tf.train.Checkpoint`` and legacy Keras, without momentum."""
    hyper = {"learning_rate": 0.1, "rho": 0.8, "decay": 0.5, "momentum": 0.0, "iter": 7}
    variables = {HYPER.format(k): np.array(v) for k, v in (hyper | changes).items()}
    return variables | {KERNEL: full(0), SLOT.format("rms"): full(4)}


def convert(variables):
    return {"w": variables["dense/kernel"].T, "b": variables["dense/bias"]}


def convert_back(tree):
    return {"dense/kernel": tree["w"].T, "dense/bias": tree["b"]}


def import_graph(variables, convert=convert, **arguments):
    arguments = {"learning_rate": 0.1, "momentum": 0.9} | arguments
    return tensorflow.import_state(variables, convert, **arguments)


def import_legacy(variables, **arguments):
    return tensorflow.import_state(
        variables,
        lambda v: v[KERNEL],
        dialect=tensorflow.legacy_keras_rmsprop,
        **arguments,
    )


def schedule(count):
    return 0.1 / (1.0 + jnp.float32(count))


class TestOptimizers:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"use_locking": True}, "use_locking must be False here, got True"),
            ({"name": "Opt"}, "name must be None here, got 'Opt'.*import_state"),
            ({"epsilon": -1.0}, "epsilon must be"),
            ({"epsilon": float("nan")}, "epsilon must be"),
            ({"decay": 1.5}, "decay must be"),
            ({"momentum": -0.1}, "momentum must be"),
            ({"learning_rate": -0.1}, "learning_rate must be"),
        ],
    )
    def test_rmsprop_rejects(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            tensorflow.rmsprop(**{"learning_rate": 0.1, **arguments})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "Opt"}, "name must be None"),
            ({"lr": 0.1}, "lr must be None.*learning_rate"),
            ({"gradient_aggregator": sum}, "gradient_aggregator must be None"),
            ({"gradient_transformers": []}, "must be None.*optax.chain"),
            ({"rho": 1.5}, "rho must be"),
            ({"decay": -0.1}, "decay must be"),
            ({"learning_rate": -0.1, "decay": 0.1}, "learning_rate must be"),
            ({"clipnorm": 0.0}, "clipnorm must be"),
            ({"clipvalue": -1.0}, "clipvalue must be"),
            ({"global_clipnorm": float("inf")}, "global_clipnorm must be"),
            ({"clipnorm": 1.0, "global_clipnorm": 1.0}, "cannot be given together"),
        ],
    )
    def test_legacy_keras_rmsprop_rejects(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            tensorflow.legacy_keras_rmsprop(**arguments)

    def test_centered_is_no_positional_argument(self):
        # TensorFlow has use_locking in that place.
        with pytest.raises(TypeError, match="positional"):
            tensorflow.rmsprop(0.1, 0.9, 0.0, 1e-10, True)

    def test_a_momentum_of_zero_needs_no_buffer(self):
        params = jnp.ones(3)
        assert tensorflow.rmsprop(0.1).init(params)[2] == optax.EmptyState()
        traced = tensorflow.rmsprop(0.1, momentum=jnp.array(0.0)).init(params)
        assert isinstance(traced[2], optax.TraceState)

    @pytest.mark.parametrize("epsilon", [0, 0.0, None])
    def test_legacy_keras_has_an_epsilon_always(self, epsilon):
        gradient = jnp.array([1e-7])
        updates = []
        for value in (epsilon, 1e-7):
            tx = tensorflow.legacy_keras_rmsprop(epsilon=value)
            updates.append(tx.update(gradient, tx.init(gradient))[0])
        np.testing.assert_array_equal(*updates)

    def test_hyperparameters_may_be_traced(self):
        gradients = jnp.array([1e-3, 2.0])
        values = {"momentum": 0.5, "epsilon": 1e-4, "rho": 0.8, "decay": 0.3}
        values |= {"clipvalue": 1.5, "global_clipnorm": 1.0, "learning_rate": 0.2}

        def two_steps(values):
            tx = tensorflow.legacy_keras_rmsprop(**values)
            _, state = tx.update(gradients, tx.init(gradients))
            return tx.update(gradients, state)[0]

        traced = jax.jit(two_steps)(jax.tree.map(jnp.float32, values))
        np.testing.assert_allclose(traced, two_steps(values), rtol=1e-6)

    def test_clipping_leaves_dtype_and_structure(self):
        tx = tensorflow.legacy_keras_rmsprop(1.0, rho=0.0, global_clipnorm=1.0)
        # 300 squared is more than float16 can hold.
        gradients = {"a": jnp.array([300.0, 400.0], jnp.float16), "b": None}
        updates, state = tx.update(gradients, tx.init(gradients))
        assert updates["a"].dtype == jnp.float16
        assert updates["b"] is None
        np.testing.assert_allclose(state[0].nu["a"], [0.36, 0.64], rtol=2e-3)

    def test_a_global_norm_that_is_not_finite_makes_everything_nan(self):
        tx = tensorflow.legacy_keras_rmsprop(global_clipnorm=1.0)
        gradients = [jnp.array([jnp.inf]), jnp.array([1.0])]
        updates, _ = tx.update(gradients, tx.init(gradients))
        assert all(jnp.isnan(u).all() for u in updates)


class TestImport:
    def test_numbered_slots(self):
        tx, (rms, _, momentum) = import_graph(graph())
        np.testing.assert_array_equal(rms.nu["w"], full(4, (3, 2)))
        np.testing.assert_array_equal(momentum.trace["b"], full(-0.5, (3,)))
        assert tx.init(convert(graph()))[2].trace["b"].shape == (3,)

    def test_centered_moves_the_momentum_to_another_number(self):
        _, (rms, _, momentum) = import_graph(graph(centered=True), centered=True)
        np.testing.assert_array_equal(rms.mu["w"], full(1, (3, 2)))
        np.testing.assert_array_equal(rms.variance["w"], full(3, (3, 2)))
        np.testing.assert_array_equal(momentum.trace["w"], full(-0.5, (3, 2)))

    def test_the_state_has_the_structure_of_init(self):
        for centered in (False, True):
            tx, state = import_graph(
                graph(centered), centered=centered, learning_rate=schedule
            )
            expected = tx.init(convert(graph()))
            chex.assert_trees_all_equal_structs(state, expected)
            for leaf, like in zip(
                *map(jax.tree.leaves, (state, expected)), strict=True
            ):
                assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)

    def test_slots_of_an_optimizer_with_another_name(self):
        variables = {k.replace("RMSProp", "Opt"): v for k, v in graph().items()}
        _, state = import_graph(variables, optimizer="Opt")
        np.testing.assert_array_equal(state[0].nu["b"], full(4, (3,)))

    def test_a_variable_without_slots_starts_fresh(self):
        variables = {k: v for k, v in graph().items() if "bias/" not in k}
        names = ["dense/kernel", "dense/bias"]
        _, state = import_graph(variables, names=names)
        np.testing.assert_array_equal(state[0].nu["b"], full(1, (3,)))
        np.testing.assert_array_equal(state[2].trace["b"], full(0, (3,)))
        np.testing.assert_array_equal(state[0].nu["w"], full(4, (3, 2)))

    @pytest.mark.parametrize("given", [None, 20])
    def test_the_number_of_steps(self, given):
        _, state = import_graph(graph(), learning_rate=schedule, step=given)
        assert state[1].count == (given or 10)
        _, state = import_legacy(legacy(), step=given)
        assert state[1].count == (given or 7)

    def test_legacy_keras_stores_its_hyperparameters(self):
        tx, state = import_legacy(legacy())
        expected = tensorflow.legacy_keras_rmsprop(0.1, 0.8, decay=0.5)
        gradients = full(1.0)
        np.testing.assert_array_equal(
            tx.update(gradients, state)[0], expected.update(gradients, state)[0]
        )

    def test_arguments_come_before_stored_settings(self):
        tx, state = import_legacy(legacy(), rho=0.0)
        _, state = tx.update(full(3.0), state)
        np.testing.assert_array_equal(state[0].nu, full(9))

    def test_a_momentum_of_zero_that_legacy_keras_keeps(self):
        variables = legacy() | {SLOT.format("momentum"): full(0.5)}
        _, state = import_legacy(variables, momentum=jnp.array(0.0))
        np.testing.assert_array_equal(state[2].trace, full(-0.5))

    def test_one_of_several_optimizers(self):
        other = SLOT.replace("optimizer", "slow").format("rms")
        variables = legacy() | {other: full(16), HYPER.format("x"): np.array("text")}
        _, state = import_legacy(variables, optimizer="optimizer")
        np.testing.assert_array_equal(state[0].nu, full(4))

    def test_half_precision(self):
        variables = {
            k: jnp.asarray(v, jnp.bfloat16) if v.ndim else v for k, v in graph().items()
        }
        _, state = import_graph(variables)
        assert state[0].nu["w"].dtype == jnp.float32
        exported = tensorflow.export_state(state, convert_back, variables)
        assert exported["dense/bias/RMSProp_1"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(exported["dense/bias/RMSProp"], full(4, (3,)))


def without(*names):
    return lambda v: {k: x for k, x in v.items() if k not in names}


def replaced(**changes):
    def replace(variables):
        return variables | {k.replace("__", "/"): x for k, x in changes.items()}

    return replace


NAN = full(np.nan)
GRAPH_DAMAGE = {
    "no variable": (without("dense/kernel"), {}, "dense/kernel is not in"),
    "no rms": (without("dense/kernel/RMSProp"), {}, "dense/kernel has no slot for rms"),
    "no momentum": (without("dense/bias/RMSProp_1"), {}, "bias has no slot for moment"),
    "centered, read as not": (
        lambda v: graph(centered=True),
        {},
        "nothing needs dense/kernel/RMSProp_2",
    ),
    "not centered, read as such": (dict, {"centered": True}, "no slot for momentum"),
    "one slot too many": (
        replaced(dense__bias__RMSProp_3=full(0, (3,))),
        {},
        "nothing needs dense/bias/RMSProp_3",
    ),
    "renamed": (
        lambda v: {
            k.replace("kernel/RMSProp", "kernel/RMSprop"): x for k, x in v.items()
        },
        {"names": ["dense/kernel", "dense/bias", "dense/scale"]},
        "dense/scale is not in the checkpoint",
    ),
    "another optimizer": (dict, {"optimizer": "Opt"}, "optimizer called 'Opt'"),
    "no slots": (
        lambda v: {k: x for k, x in v.items() if "RMSProp" not in k},
        {},
        "no variable has slots",
    ),
    "names with numbers of outputs": (
        lambda v: {f"{k}:0": x for k, x in v.items()},
        {},
        "no variable has slots",
    ),
    "transposed": (
        replaced(dense__kernel__RMSProp=full(4, (3, 2))),
        {},
        r"kernel/RMSProp must be float32\[2, 3\], got float32\[3, 2\]",
    ),
    "slots of another variable": (
        replaced(dense__kernel__RMSProp=full(4, (3,))),
        {},
        r"kernel/RMSProp must be float32\[2, 3\], got float32\[3\]",
    ),
    "integers": (
        replaced(dense__kernel__RMSProp=full(4, dtype=np.int32)),
        {},
        "kernel/RMSProp must be floating-point or complex, got int32",
    ),
    "double precision": (
        replaced(dense__kernel__RMSProp_1=full(4, dtype=np.float64)),
        {},
        r"RMSProp_1 must be float32\[2, 3\], got float64",
    ),
    "no array": (
        replaced(dense__kernel__RMSProp="lost"),
        {},
        "kernel/RMSProp must be an array",
    ),
    "NaN": (replaced(dense__kernel__RMSProp=NAN), {}, "kernel/RMSProp must be finite"),
    "infinite momentum": (
        replaced(dense__kernel__RMSProp_1=NAN * np.inf),
        {},
        "RMSProp_1 must be finite",
    ),
    "negative": (
        replaced(dense__kernel__RMSProp=full(-4)),
        {},
        "kernel/RMSProp must not be negative, got 6",
    ),
    "integer variable": (
        replaced(dense__kernel=full(0, dtype=np.int32)),
        {},
        "dense/kernel must be floating-point, got int32",
    ),
    "complex variable": (
        replaced(dense__kernel=full(0, dtype=np.complex64)),
        {},
        r"dense/kernel must be floating-point.*\|g\|\^2",
    ),
    "a name left out": (
        dict,
        {"names": ["dense/bias"]},
        "kernel has slots .* not among",
    ),
    "a name too many": (
        dict,
        {"names": ["dense/kernel", "dense/bias", "dense/scale"]},
        "dense/scale is not in the checkpoint",
    ),
    "no number of steps": (
        without("global_step"),
        {"learning_rate": schedule},
        "no global_step.*step",
    ),
    "negative steps": (
        replaced(global_step=np.array(-1)),
        {"learning_rate": schedule},
        "global_step must be",
    ),
    "half a step": (
        dict,
        {"learning_rate": schedule, "step": 1.5},
        "step must be a whole number",
    ),
    "several steps": (
        replaced(global_step=np.arange(3)),
        {"learning_rate": schedule},
        r"global_step must be a number, got shape \(3,\)",
    ),
    "NaN decay": (dict, {"decay": float("nan")}, "decay must be"),
    "no mapping": (list, {}, "must be a mapping"),
    "no names": (lambda v: dict(enumerate(v.values())), {}, "must be a mapping"),
}


class TestDamage:
    @pytest.mark.parametrize("kind", GRAPH_DAMAGE)
    def test_damaged_graph_is_reported(self, kind):
        damage, arguments, message = GRAPH_DAMAGE[kind]
        with pytest.raises(ValueError, match=message):
            import_graph(damage(graph()), **arguments)

    def test_squares_that_underflow_are_no_damage(self):
        variables = graph(centered=True)
        variables["dense/bias/RMSProp"] = full(0.0, (3,))
        variables["dense/bias/RMSProp_1"] = full(1e-19, (3,))
        import_graph(variables, centered=True)

    def test_swapped_slots(self):
        variables = graph(centered=True)
        variables["dense/bias/RMSProp"] = full(0.25, (3,))
        with pytest.raises(ValueError, match="dense/bias has a slot rms that is much"):
            import_graph(variables, centered=True)

    @pytest.mark.parametrize(
        ("changes", "arguments", "message"),
        [
            ({HYPER.format("rho"): np.array(np.nan)}, {}, "rho.* must be a finite"),
            ({HYPER.format("rho"): np.array(1.5)}, {}, "rho must be"),
            ({HYPER.format("iter"): np.array(-7)}, {}, "iter.* must be"),
            ({HYPER.format("learning_rate"): None}, {}, "learning_rate was a schedule"),
            ({SLOT.format("momentum"): full(0)}, {}, "nothing needs .*/momentum/"),
            ({}, {"momentum": 0.9}, "no slot for momentum"),
            ({}, {"centered": True}, "no slot for mg"),
            ({SLOT.format("m"): full(0)}, {}, "nothing needs .*/m/"),
            ({KERNEL: None}, {}, "model/kernel.* is not in the checkpoint"),
            ({}, {"optimizer": "other"}, r"must be one of \['optimizer'\], .*'other'"),
            (
                {SLOT.replace("optimizer", "slow").format("rms"): full(1)},
                {},
                r"must be one of \['optimizer', 'slow'\], .* None",
            ),
        ],
    )
    def test_damaged_legacy_keras_is_reported(self, changes, arguments, message):
        variables = {k: v for k, v in (legacy() | changes).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            import_legacy(variables, **arguments)

    def test_is_reported_all_at_once(self):
        variables = replaced(
            dense__kernel__RMSProp=NAN,
            dense__kernel__RMSProp_1=full(1, (3, 2)),
            dense__bias__RMSProp=full(-1, (3,)),
        )(graph())
        with pytest.raises(ValueError, match="cannot be imported") as raised:
            import_graph(variables)
        for name in (
            "kernel/RMSProp must",
            "kernel/RMSProp_1 must",
            "bias/RMSProp must",
        ):
            assert name in str(raised.value)

    @pytest.mark.parametrize(
        ("convert", "message"),
        [
            (lambda v: {"w": v["dense/kernel"]}, "dense/bias"),
            (
                lambda v: {"w": v["dense/kernel"] * 2, "b": v["dense/bias"]},
                "0 came back",
            ),
            (lambda v: {"w": v["dense/weight"]}, "KeyError"),
        ],
    )
    def test_bad_conversion_is_reported(self, convert, message):
        with pytest.raises(ValueError, match=message):
            import_graph(graph(), convert)


class TestExport:
    def state(self, **arguments):
        tx = optax_rms.rmsprop(**{"learning_rate": 0.1, "momentum": 0.9} | arguments)
        params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)}
        gradients = jax.tree.map(jnp.ones_like, params)
        return tx.update(gradients, tx.init(params))[1]

    def test_zeros_where_there_is_no_momentum(self):
        exported = tensorflow.export_state(
            self.state(momentum=None), convert_back, graph()
        )
        np.testing.assert_array_equal(exported["dense/kernel/RMSProp_1"], full(0))

    def test_the_number_of_steps_of_a_schedule(self):
        state = self.state(learning_rate=schedule)
        exported = tensorflow.export_state(state, convert_back, graph())
        assert exported["global_step"] == 1
        assert exported["global_step"].dtype == graph()["global_step"].dtype
        assert "global_step" not in tensorflow.export_state(
            self.state(), convert_back, graph()
        )

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"lr_in_momentum": False}, "leaves the learning rate out"),
            ({"bias_correction": True}, "bias correction"),
            ({"bias_correction": True, "centered": True}, "bias correction"),
            (optax.adam(0.1).init(jnp.zeros(3)), "must be the tuple of three"),
            (
                (*optax.adam(0.1).init(jnp.zeros(3)), 0),
                "nothing like ScaleByAdamState",
            ),
            (
                torch.rmsprop(momentum=0.9).init(jnp.zeros(3)),
                "leaves the learning rate",
            ),
            (None, "must be the tuple of three"),
        ],
    )
    def test_refuses_a_state_that_tensorflow_cannot_have(self, state, message):
        if isinstance(state, dict):
            state = self.state(**state)
        with pytest.raises(ValueError, match=message):
            tensorflow.export_state(state, convert_back, graph())

    @pytest.mark.parametrize(
        ("back", "like", "message"),
        [
            (lambda t: [t["w"], t["b"]], graph(), "must return a mapping"),
            (
                lambda t: {"w": t["w"], "b": t["b"]},
                graph(),
                "w comes from convert_back",
            ),
            (
                lambda t: {"w": t["w"], "b": t["b"]},
                graph(),
                "dense/kernel has slots in",
            ),
            (lambda t: {"dense/bias": t["b"]}, graph(), "came back"),
            (
                lambda t: {"dense/kernel": t["w"], "dense/bias": t["b"]},
                graph(),
                r"dense/kernel/RMSProp must be float32\[2, 3\], got float32\[3, 2\]",
            ),
            (convert_back, graph(centered=True), "nothing needs .*RMSProp_2"),
            (convert_back, without("dense/bias/RMSProp_1")(graph()), "no slot for mom"),
            (convert_back, {}, "no variable has slots"),
            (
                convert_back,
                {k: v.astype(np.float64) for k, v in graph().items()},
                r"RMSProp must be float64\[2, 3\], got float32",
            ),
        ],
    )
    def test_refuses_another_checkpoint(self, back, like, message):
        with pytest.raises(ValueError, match=message):
            tensorflow.export_state(self.state(), back, like)

    def test_refuses_momentum_where_legacy_keras_has_none(self):
        with pytest.raises(ValueError, match="no slot for momentum"):
            tensorflow.export_state(
                self.state(), lambda t: {KERNEL: t["w"].T}, legacy()
            )
