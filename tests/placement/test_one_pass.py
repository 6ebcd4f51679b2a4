# SPDX-License-Identifier: Apache-2.0
"""One loop per parameter under the flag of XLA, and no change without the flag."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import one_pass_program as program
from helpers.running import step

from optax_rms import one_pass

ROOT = pathlib.Path(__file__).parents[2]
# jaxlib 0.6.0 ignores the flag, and jaxlib 0.10.2 does not.
NO_SUCH_FLAG = jax.__version_info__ < (0, 10)
no_such_flag = pytest.mark.skipif(NO_SUCH_FLAG, reason="this jaxlib merges no loops")


def with_flag(*module):
    """Run a module in a process in which XLA has the flag from the start."""
    environment = os.environ | {"XLA_FLAGS": program.FLAG}
    command = [sys.executable, "-m", *module]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True
    )


@functools.cache
def run_program(*names):
    return with_flag("tests.helpers.one_pass_program", *names)


def measured(names):
    done = run_program(*names)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def all_cases(names, *marks):
    return [pytest.param(name, tuple(names), marks=marks) for name in names]


every_case = pytest.mark.parametrize(
    ("name", "names"),
    [*all_cases(program.FLOAT32), *all_cases(program.NARROW, pytest.mark.slow)],
)


@no_such_flag
@every_case
def test_bytes_that_a_step_moves(name, names):
    found, case = measured(names)[name], program.CASES[name]
    # Scalars, and the random numbers of each row and column of the parameter.
    assert found["moved"] < case.most_bytes + 0.1
    if name in program.FLOAT32:
        # No temporary array has the size of the parameter.
        assert found["temporary"] < 0.1


@no_such_flag
@every_case
def test_bits_are_those_of_inner(name, names):
    assert measured(names)[name]["same_bits"]


@no_such_flag
def test_one_call_per_output_in_a_compiled_step_and_one_call_elsewhere():
    """Updates, ``mu`` and ``nu`` of Adam, and operations that are run one by one."""
    assert measured(tuple(program.FLOAT32))["calls"] == [3, 1]


@pytest.mark.skipif(not NO_SUCH_FLAG, reason="this jaxlib merges loops")
def test_a_jaxlib_without_the_flag_is_an_error():
    done = run_program()
    assert "RuntimeError" in done.stderr
    assert "update jaxlib" in done.stderr


def program_of(tx):
    params = {"w": jax.ShapeDtypeStruct((3, 4), "float32")}
    compiled = jax.jit(functools.partial(step, tx))
    return compiled.lower(params, jax.eval_shape(tx.init, params), params).as_text()


@pytest.fixture
def flag_set_too_late(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {program.FLAG}")


@pytest.mark.parametrize("name", ["momentum", "optax.lion", "UE6M2"])
def test_without_the_flag_the_program_is_that_of_inner(name):
    make = program.CASES[name].make
    assert program_of(one_pass(make())) == program_of(make())


def test_on_a_gpu_the_program_is_that_of_inner(monkeypatch, flag_set_too_late):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert program_of(one_pass(optax.lion(1e-3))) == program_of(optax.lion(1e-3))


def test_a_flag_that_was_set_too_late_is_an_error(flag_set_too_late):
    with pytest.raises(RuntimeError, match="before the first computation"):
        program_of(one_pass(optax.adam(1e-3)))


def test_an_update_that_is_not_compiled_needs_no_flag(flag_set_too_late):
    tx, params = one_pass(optax.sgd(0.5)), jnp.ones(3)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates.tolist() == [-0.5, -0.5, -0.5]


@no_such_flag
@pytest.mark.slow
def test_contract_under_the_flag():
    """Without the flag, the row of `one_pass` is ``inner`` to the contract."""
    checks = [f"tests/contract/test_contract_{of}.py" for of in ("jax", "optax")]
    done = with_flag("pytest", "-q", "-n=0", "-m=", "-k=one_pass", *checks)
    assert done.returncode == 0, done.stdout + done.stderr
