# SPDX-License-Identifier: Apache-2.0
"""A short form of `benchmarks.same_bits`: few steps, and the runs that differ most."""

import numpy as np
import pytest

from benchmarks import same_bits

CASE = same_bits.RESUMED[0]
STEPS = 6


def test_differences_are_found():
    """In every dtype, down to the sign of a zero; of single elements, apart."""
    lone = np.ones(same_bits.LONE, np.float32)
    for dtype in ("float32", "bfloat16", "uint8", "int32"):
        tree = {"a": np.zeros((2, 3), dtype), "count": np.zeros((), dtype)}
        changed = {"a": tree["a"].copy(), "count": np.ones((), dtype)}
        changed["a"][1, 2] = -0.0 if dtype == "float32" else 1
        found = same_bits.differences(tree | {"lone": lone}, changed | {"lone": lone})
        assert (found["compared"], found["different"]) == (7, 2)
        assert found["lone_different"] == 0
    other = lone.copy()
    other[3] = np.nextafter(lone[3], np.float32(2))
    found = same_bits.differences(other, lone)
    assert (found["compared"], found["lone_different"]) == (0, 1)
    assert found["lone_largest"] == 1


def test_every_row_but_one_is_compared():
    names = same_bits.cases()
    assert {"plain", "torch", "keras", "tensorflow", CASE} < set(names)
    assert "shard_state" not in names


@pytest.mark.slow
def test_compressed_on_eight_devices(monkeypatch):
    *_, last = same_bits.layouts()
    monkeypatch.setattr(same_bits, "layouts", lambda: [last])
    (row,) = same_bits.compare(same_bits.FORMATS[CASE], STEPS)
    assert row["layout"] == "8 devices, two axes"
    assert row["compared"] > 1000
    assert row["different"] == row["collectives"] == 0


@pytest.mark.slow
def test_compressed_from_checkpoints_of_other_meshes(monkeypatch, tmp_path):
    """In place of two processes, one of eight devices."""

    def first_half(name, steps, path):
        make, dtype = same_bits.FORMATS[name]
        params, gradients = same_bits.data(steps, dtype)
        run = same_bits.Run(make(), (4, 2), ("x", "y"), params)
        first = {k: g[: steps // 2] for k, g in gradients.items()}
        same_bits.save(path, run(params, first)[0])

    chain = next(iter(same_bits.CHAINS))
    monkeypatch.setattr(same_bits, "CHAINS", {chain: same_bits.CHAINS[chain]})
    monkeypatch.setattr(same_bits, "first_half_in_two_processes", first_half)
    rows = same_bits.resume(CASE, STEPS, tmp_path)
    assert [row["chain"] for row in rows] == [
        *same_bits.CHAINS,
        same_bits.TWO_PROCESSES,
    ]
    for row in rows:
        assert row["compared"] > 1000
        assert row["different"] == 0
