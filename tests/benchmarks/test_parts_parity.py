# SPDX-License-Identifier: Apache-2.0
"""Every part from start to end, at the least size, with what is quick to compile."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.frameworks import require, require_submodule

import optax_rms
from benchmarks import __main__ as command
from benchmarks import (
    calls,
    eager,
    growth,
    memory,
    one_pass,
    peers,
    stages,
    update_step,
)
from benchmarks.leaves import distinct_shapes

SHAPES = [(4, 256), (8,)]
JAX_SIDES = [peers.OURS, peers.OPTAX]


def in_silence(iterable, **_):
    return iterable


def test_quick_update_step_measures_every_side():
    sides = [*JAX_SIDES, "absent"]
    peers_and_absent = peers.SIDES | {"absent": lambda _: peers.module("no_such")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "SIDES", peers_and_absent)
        rows = update_step.compare(SHAPES, update_step.Comparison(sides), 0.1)
    assert [row["side"] for row in rows] == [update_step.COPY, *sides]
    assert rows[-1]["not_measured"] == "not installed"
    for row in rows[:-1]:
        assert row["moved_bytes"] == 20 * (1024 + 8)
        assert row["seconds"]["rounds"] >= 20
        assert row["seconds"]["median"] > 0


def test_sides_in_processes_take_turns():
    sides = [one_pass.OURS, peers.OURS, peers.COMPILED]
    *rows, missing = one_pass.compare(201 * [(8,)], sides, 0.1)
    assert [row["side"] for row in rows] == sides[:2]
    for row in rows:
        assert row["moved_bytes"] == 20 * 201 * 8
        assert row["seconds"]["rounds"] >= 20
    assert missing["not_measured"] == "takes minutes to compile"


def test_eager_measures_every_library_without_a_compiler(monkeypatch):
    require("torch")
    monkeypatch.setattr(eager, "SHAPES", SHAPES)
    monkeypatch.setattr(eager, "OPTIONS", {"momentum": {"momentum": 0.9}})
    rows = eager.measure(quick=True, progress=in_silence)["rows"]
    sides = ["optax_rms.rmsprop", "optax.rmsprop", "torch.optim.RMSprop"]
    assert [row["side"] for row in rows] == sides
    assert all(row["seconds"]["median"] > 0 for row in rows)
    run = eager.EagerRun(optax.sgd(1.0), peers.Leaves([(3,)]))
    before = run.params[0]
    run(2)
    np.testing.assert_allclose(
        run.params[0], before - 2 * peers.Leaves([(3,)]).jax_gradients[0], rtol=1e-6
    )


def test_calls_measure_a_step_and_less():
    rows = calls.compare(4 * [(1000,)], 0.1)
    sides = [calls.COPY, "no arithmetic", "one step", "10 steps in a loop"]
    assert [row["side"] for row in rows] == sides
    assert {row["moved_bytes"] for row in rows} == {20 * 4000}
    assert all(row["seconds"]["median"] > 0 for row in rows)


def test_quick_growth_measures_every_size(monkeypatch):
    monkeypatch.setattr(growth, "QUICK_ELEMENTS", [1000])
    monkeypatch.setattr(growth, "QUICK_LEAF_COUNTS", [2])
    monkeypatch.setattr(growth, "QUICK_TOTAL", 100)
    monkeypatch.setattr(growth, "COMPARED", [*JAX_SIDES, peers.COMPILED])
    rows = growth.measure(quick=True, progress=in_silence)["rows"]
    assert {row["side"] for row in rows["elements"]} == {*JAX_SIDES, growth.COPY}
    assert all(row["n"] == 2 for row in rows["leaves"])


def test_quick_stages_measure_every_side(monkeypatch):
    monkeypatch.setattr(stages, "COMPARED", JAX_SIDES)
    monkeypatch.setattr(stages, "QUICK_LEAF_COUNTS", [2])
    monkeypatch.setattr(stages, "QUICK_TOTAL", 100)
    rows = stages.measure(quick=True, progress=in_silence)["rows"]
    found = {(row["shapes"], row["n"], row["side"]) for row in rows}
    shapes = (stages.ONE_SHAPE, stages.ALL_DIFFERENT)
    assert found == {(name, 2, side) for name in shapes for side in JAX_SIDES}
    for row in rows:
        for stage in ("trace_and_lower", "compile"):
            assert row[stage]["rounds"] == stages.QUICK_ROUNDS
            assert row[stage]["median"] > 0


@pytest.mark.parametrize("count", [1, 2, 25, 1000])
def test_distinct_shapes_add_up(count):
    shapes = distinct_shapes(count, growth.TOTAL)
    assert len(set(shapes)) == count
    assert sum(n for (n,) in shapes) == pytest.approx(growth.TOTAL, rel=1e-3)


def test_centered_is_finite_with_steps_as_long_as_epsilon_admits():
    require("torch")
    require("keras")
    from benchmarks import fidelity

    rows = fidelity.centered()
    ours = [row for row in rows if row["optimizer"] == "optax_rms.rmsprop"]
    assert all((row["nan_weights"] == 0) == (row in ours) for row in rows)
    # A step is the difference of two float32 weights, each of at most 400 steps.
    tolerance = 400 * 2**-23
    for row in ours:
        # The variance is at least 0, so that |g| / sqrt(eps) is the limit.
        assert row["longest_step"] <= 1000 / row["eps"] ** 0.5 * (1 + tolerance)
    (large,) = (row for row in ours if row["eps"] == 1e-2)
    assert large["longest_step"] == pytest.approx(1000 / 0.1, rel=tolerance)
    (plain,) = (row for row in ours if not row["centered"])
    # The first step: the mean square is 1 - decay = 0.1 of the squared gradient.
    assert plain["longest_step"] == pytest.approx(0.1**-0.5, rel=tolerance)


def test_memory(monkeypatch):
    monkeypatch.setattr(memory, "CASES", [(peers.UE6M2, "bfloat16")])
    (row,) = memory.measure(quick=True, progress=in_silence)["rows"]
    assert row["state"] == pytest.approx(1, abs=1e-4)
    # Of a bfloat16 gradient, read, a parameter and a code, read and written.
    assert row["limit"] == pytest.approx(2 + 4 + 2, abs=1e-4)
    assert row["accessed"] >= row["limit"]


def carried(run, steps=3):
    run(steps)
    return jax.tree.leaves(run._carry[0])


def test_jax_sides_take_the_steps_of_the_library():
    leaves = peers.Leaves(SHAPES)
    tx = optax_rms.rmsprop(peers.LEARNING_RATE)
    params = leaves.jax_params()
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(leaves.jax_gradients, state, params)
        params = optax.apply_updates(params, updates)
    for side in JAX_SIDES:
        run = peers.SIDES[side](leaves)
        assert run.state_bytes == 4 * leaves.elements
        assert set(run.compile_seconds) == {"trace", "lower", "compile"}
        for found, expected in zip(carried(run), params, strict=True):
            # Three steps of 1e-3 to 3e-3, with some roundings each.
            np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("side", [s for s in peers.SIDES if s.startswith("optax")])
def test_every_jax_side_takes_steps(side):
    dtype = "bfloat16" if side == peers.SPLIT else "float32"
    leaves = peers.Leaves([(8,)], dtype)
    (param,) = carried(peers.SIDES[side](leaves))
    assert param.dtype == leaves.dtype
    assert jnp.all(jnp.isfinite(param))
    assert jnp.any(param != 1)


def test_keras_takes_its_own_steps():
    keras = require("keras")
    leaves = peers.Leaves(SHAPES)
    variables = [keras.Variable(p) for p in leaves.jax_params()]
    optimizer = keras.optimizers.RMSprop(peers.LEARNING_RATE)
    for _ in range(3):
        optimizer.apply(leaves.jax_gradients, variables)
    found = carried(peers.SIDES[peers.KERAS](leaves))
    for x, variable in zip(found, variables, strict=True):
        np.testing.assert_allclose(x, variable.value, atol=1e-6)


@pytest.mark.parametrize(
    "side",
    [
        *(peers.EAGER, peers.FOREACH, peers.TIMM),
        *(peers.BITSANDBYTES, peers.BITSANDBYTES_8BIT),
    ],
)
def test_torch_takes_steps(side):
    package = side.split()[0].split(".")[0]
    if package == "timm":
        require_submodule("timm.optim.rmsprop_tf")
    else:
        require(package)
    leaves = peers.Leaves(SHAPES)
    run = peers.SIDES[side](leaves)
    run(2)
    assert run.state_bytes >= 4 * leaves.elements
    assert all((p != 1).all() for p in leaves.torch_params)


def test_many_leaves_are_not_compiled_by_torch():
    reasons = {peers.COMPILED: "takes minutes to compile"}
    assert peers.start([peers.COMPILED], peers.Leaves(201 * [(1,)])) == ({}, reasons)


def test_command_saves_a_file_for_the_device(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "measure", lambda quick, progress: {"quick": quick})
    assert command.main(["--quick", "--only", "memory", "--output", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "memory.cpu.json").read_text())
    assert saved["measured"] == {"quick": True}


def test_command_goes_on_without_a_part(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "PARTS", {"absent": False} | command.PARTS)
    monkeypatch.setattr(memory, "measure", lambda quick, progress: {})
    argv = ["--only", "absent,memory", "--output", str(tmp_path)]
    assert command.main(argv) == 1
    assert "absent: not measured" in capsys.readouterr().out
    assert (tmp_path / "memory.cpu.json").exists()


def test_command_rejects_unknown_parts(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "memory,speed"])
    assert "not speed" in capsys.readouterr().err
