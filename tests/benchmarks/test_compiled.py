# SPDX-License-Identifier: Apache-2.0
"""What is read from compiled programs, beside what XLA says of those for the CPU."""

import json

import jax
import numpy as np
import pytest
from helpers.on_request import first_by_default
from jax.sharding import Mesh

from benchmarks import compiled, peers, report

SHAPES = [(64, 32), (16,)]
# What XLA makes for a TPU's vector memory, S(1), in the order of execution.
THROUGH_VECTOR_MEMORY = """HloModule example

ENTRY %main (p.1: f32[8,128]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, \
u32[]{:S(2)}) copy-start(%p.1)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fusion = (f32[8,128]{1,0:T(8,128)S(1)}, /*index=1*/f32[4]{0}) \
fusion(%copy-done, %copy-done), kind=kLoop, calls=%computation
  %element = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%fusion), index=0
  %copy-start.1 = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, \
u32[]{:S(2)}) copy-start(%element)
  ROOT %copy-done.1 = f32[8,128]{1,0:T(8,128)} copy-done(%copy-start.1)
}
"""


def mesh(n):
    return Mesh(np.reshape(jax.devices()[: n * n], (n, n)), ("rows", "columns"))


@pytest.mark.parametrize("side", first_by_default(compiled.TRANSFORMATIONS, 4))
def test_bytes_are_those_that_xla_counts(side):
    program = compiled.compile_step(side, SHAPES, "float32", mesh(1))
    expected = program.cost_analysis()["bytes accessed"]
    # Which include the tuple of pointers to the results.
    pointers = 8 * program.out_tree.num_leaves
    assert compiled.moved_bytes(program.as_text()) + pointers == expected


def test_vector_memory_is_not_memory():
    moved = compiled.moved_bytes(THROUGH_VECTOR_MEMORY)
    assert moved == 4 * (8 * 128 + 4 + 8 * 128)
    assert len(compiled.launches(THROUGH_VECTOR_MEMORY)) == 3


def test_a_slice_into_vector_memory_counts_once():
    program = """HloModule example

ENTRY %main (p: f32[2000,256]) -> f32[8] {
  %p = f32[2000,256]{1,0:T(8,128)} parameter(0)
  %slice-start = ((f32[2000,256]{1,0:T(8,128)}), f32[504,256]{1,0:T(8,128)S(1)}, \
s32[]{:S(2)}) slice-start(%p), slice={[0:504], [0:256]}
  %slice-done = f32[504,256]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  ROOT %fusion = f32[8]{0:T(128)} fusion(%slice-done), kind=kLoop, calls=%computation
}
"""
    assert compiled.moved_bytes(program) == 4 * (504 * 256 + 8)


@pytest.mark.parametrize(
    ("side", "some"), [(peers.UE6M2, False), (peers.FACTORED, True)]
)
def test_collectives_are_found(side, some):
    program = compiled.compile_step(side, [(256, 256)], "float32", mesh(2))
    assert bool(compiled.COLLECTIVE.findall(program.as_text())) == some


def test_a_table_has_a_row_for_each_optimizer(monkeypatch, tmp_path):
    class Host:
        devices = jax.devices()[:4]

    monkeypatch.setattr(compiled, "DEVICES", {"H100": Host, "TPU v5e": Host})
    monkeypatch.setattr(compiled, "CASES", [(peers.OURS, "bfloat16")])
    monkeypatch.setattr(compiled, "MANY_LEAVES", "one leaf of 16M")
    measured = compiled.measure(progress=lambda cases, **_: cases)
    assert [row["limit"] for row in measured["rows"]] == pytest.approx([14, 14])
    (tmp_path / "compiled.json").write_text(json.dumps({"measured": measured}))
    head, _, row = report.compiled(tmp_path).splitlines()
    assert row.startswith("| `optax_rms.rmsprop` | bfloat16 | 14 | 20 |")
    assert row.count("|") == head.count("|")
