# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of made-up results."""

import json

import numpy as np
import pytest

from benchmarks import figures, record, report, stages

HEADER = {
    "command": "python -m benchmarks",
    "date": "2000-01-01",
    "commit": "abc",
    "machine": {"device": "cpu", "cores": 2},
    "versions": {"jax": "1.2.3", "bitsandbytes": None},
}


def spread(median):
    quartiles = {"lower_quartile": 0.9 * median, "upper_quartile": 1.1 * median}
    return {"median": median, "rounds": 20} | quartiles


STEPS = [
    {"side": "copy", "moved_bytes": 1000, "seconds": spread(1e-3)},
    {"side": "ours", "moved_bytes": 2000, "seconds": spread(3e-3)},
    {"side": "theirs", "moved_bytes": 4000, "seconds": spread(6e-3)},
    {"side": "missing", "not_measured": "not installed"},
]
MEMORY = [
    {"side": "ours", "dtype": "float32", "state": 4.0, "limit": 20.0}
    | {"accessed": 28.0, "temporary": 0.0, "allocator_peak": None},
    {"side": "missing", "dtype": "float32", "not_measured": "not installed"},
]


@pytest.fixture
def results(tmp_path):
    rows = [{"leaves": "few", "comparison": "plain"} | row for row in STEPS]
    for name, measured in (("update_step", rows), ("memory", MEMORY)):
        content = HEADER | {"measured": {"rows": measured}}
        (tmp_path / f"{name}.cpu.json").write_text(json.dumps(content))
    return tmp_path


def body(results, name):
    return report.TABLES[name](results).splitlines()[2:]


def test_table_of_times(results):
    assert body(results, "times_cpu") == [
        "| plain | `ours` | 3.00 (2.70 to 3.30) |",
        "| plain | `theirs` | 6.00 (5.40 to 6.60) |",
        "| plain | `missing` | not installed |",
    ]


def test_limits_are_in_the_bytes_of_each_row(results):
    assert body(results, "limits_cpu") == [
        "| plain | `ours` | 1.50 |",
        "| plain | `theirs` | 1.50 |",
        "| plain | `missing` | not installed |",
    ]


def test_table_of_ratios(results):
    assert body(results, "ratios_cpu") == [
        "| plain | `ours` | 1.00 |",
        "| plain | `theirs` | 2.00 |",
        "| plain | `missing` | not installed |",
    ]


def test_no_ratio_to_a_side_that_was_not_measured(tmp_path):
    for first, text in (
        (STEPS[1], "6.00 (5.40 to 6.60), 2.00"),
        (STEPS[3], "6.00 (5.40 to 6.60)"),
    ):
        rows = [{"leaves": "few", "comparison": "plain"} | r for r in (first, STEPS[2])]
        content = HEADER | {"measured": {"rows": rows}}
        (tmp_path / "one_pass.cpu.json").write_text(json.dumps(content))
        assert body(tmp_path, "one_pass_cpu")[1] == f"| plain | `theirs` | {text} |"


def test_memory(results):
    ours, missing = body(results, "memory_cpu")
    assert ours == "| `ours` | float32 | 4 | 20 | 28 | 0 |  |"
    assert missing.count("not installed") == 5


def test_stages_compare_the_rounds_of_one_measurement(results):
    """Not what other comparisons took to compile, for example those of bfloat16."""
    sides = {"optax_rms.rmsprop": (3e-3, 4e-2), "optax.rmsprop": (2e-3, 8e-2)}
    sides["optax_rms.rmsprop, nu=UE6M2"] = 8e-3, 6e-2
    keys = ("trace_and_lower", "compile")
    rows = [
        {"shapes": "few", "n": 2, "side": side}
        | {key: spread(time) for key, time in zip(keys, times, strict=True)}
        for side, times in sides.items()
    ]
    content = HEADER | {"measured": {"total": 10, "rows": rows}}
    (results / "stages.cpu.json").write_text(json.dumps(content))
    path = results / "update_step.cpu.json"
    steps = json.loads(path.read_text())
    slow = {"trace": 10.0, "lower": 10.0, "compile": 10.0}
    steps["measured"]["rows"] += [
        {"leaves": "few", "comparison": dtype, "side": "optax_rms.rmsprop"}
        | {"seconds": spread(1e-3), "moved_bytes": 1000, "compile_seconds": slow}
        for dtype in ("bfloat16", "float16")
    ]
    path.write_text(json.dumps(steps))
    assert body(results, "stages_cpu") == [
        "| few | 2 | 0.00300 (0.00270 to 0.00330) | 0.00200 (0.00180 to 0.00220) "
        "| 1.50 | 4.00 | 0.0400 (0.0360 to 0.0440) | 0.0800 (0.0720 to 0.0880) "
        "| 0.50 | 0.75 |"
    ]


def test_centered_has_the_longest_step_beside_the_count_of_nan(tmp_path):
    rows = [
        {"optimizer": "jax.rmsprop", "centered": True, "eps": 1e-8}
        | {"nan_weights": 7, "longest_step": 3621968.75},
        {"optimizer": "jax.rmsprop", "centered": False, "eps": 0.01}
        | {"nan_weights": 0, "longest_step": 3.16228},
    ]
    content = HEADER | {"measured": {"centered": rows}}
    (tmp_path / "fidelity.json").write_text(json.dumps(content))
    assert body(tmp_path, "centered") == [
        "| `jax.rmsprop` | 1.2.3 | yes | `1e-8` | 7 | 3,600,000 |",
        "| `jax.rmsprop` | 1.2.3 | no | `1e-2` | 0 | 3.2 |",
    ]


def test_table_of_a_pod(tmp_path):
    row = {"side": "ours", "dtype": "float32", "state": 10**8, "floor": 5 * 10**8}
    row |= {"moved": 5.1 * 10**8, "temporary": 0, "collectives": 0}
    content = HEADER | {"measured": {"rows": [row]}}
    (tmp_path / "pod.json").write_text(json.dumps(content))
    assert body(tmp_path, "pod") == [
        "| `ours` | float32 | 100.0 | 500.0 | 510.0 | 0.0 | 0 |"
    ]


def test_tables_of_same_bits(tmp_path):
    layout = {"compared": 1000, "different": 0, "collectives": 0}
    layouts = [
        layout | {"lone_different": 0, "lone_largest": 0.0},
        layout | {"lone_different": 2, "lone_largest": 1.5, "collectives": 3},
    ]
    rows = [{"row": "a", "layouts": layouts}, {"row": "b", "layouts": layouts[:1]}]
    chain = {"chain": "8 to 1", "compared": 2000, "different": 1}
    chains = [chain | {"lone_different": 2, "lone_largest": 0.5}]
    measured = {"rows": rows, "resumed": [{"row": "c", "chains": chains}]}
    (tmp_path / "same_bits.json").write_text(
        json.dumps(HEADER | {"measured": measured})
    )
    assert body(tmp_path, "same_bits") == [
        "| a | 2,000 | 0 | 2, by at most 1.50 | 3 |",
        "| b | 1,000 | 0 | 0 | 0 |",
    ]
    assert body(tmp_path, "resumed") == [
        "| c | 8 to 1 | 2,000 | 1 | 2, by at most 0.500 |"
    ]


def test_origin_names_what_was_there(results):
    row = "| `python -m benchmarks` | cpu, 2 cores | 2000-01-01 | abc | jax 1.2.3 |"
    assert body(results, "origin_cpu") == [row]


def test_origin_has_a_row_for_each_command(results):
    path = results / "memory.cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "def"}))
    commits = [row.split(" | ")[3] for row in body(results, "origin_cpu")]
    assert commits == ["abc", "def"]


@pytest.mark.parametrize("name", report.TABLES)
def test_without_results_a_table_says_so(tmp_path, name):
    page = f"<!-- table: {name} -->\nold\n<!-- end of table -->\n"
    fresh = f"<!-- table: {name} -->\nnot measured\n<!-- end of table -->\n"
    assert report.rendered(page, tmp_path) == fresh


def test_dqn_compares_seed_by_seed_over_the_last_fifth(results):
    """Returns are 1 and 3 lower; the first 8 of 10 epochs do not count."""
    early, none = [[9.0, 9.0]] * 8, [[0.5, 0.5]] * 10
    runs = {
        "recipes.dqn": {"return": [*early, [3, 4], [5, 6]], "ruled_by_eps": none},
        "other": {"return": [*early, [3, 2], [3, 2]], "ruled_by_eps": none},
    }
    (results / "train_dqn.json").write_text(json.dumps({"runs": runs}))
    assert body(results, "dqn") == [
        "| `recipes.dqn` | 4.50 ± 0.71 |  | 50% |",
        "| other | 2.50 ± 0.71 | -2.0 ± 1.4 | 50% |",
    ]


def test_every_device_has_its_own_tables(results):
    assert report.TABLES["times_h100"](results) == "not measured\n"
    (results / "update_step.cpu.json").rename(results / "update_step.h100.json")
    assert "`theirs`" in report.TABLES["times_h100"](results)
    assert report.TABLES["times_cpu"](results) == "not measured\n"


@pytest.mark.parametrize("x", [1234.0, 12.34, 1.0, 0.0123])
def test_three_significant_figures(x):
    assert float(report.significant(x)) == pytest.approx(x, rel=5e-3)
    assert len(report.significant(x).strip("0.").replace(".", "")) <= 4


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cpu", "cpu"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
    ],
)
def test_device_name(monkeypatch, kind, name):
    class Device:
        device_kind = kind

    monkeypatch.setattr(record.jax, "devices", lambda: [Device])
    assert record.device_name() == name


def test_saved_results_say_where_they_come_from(monkeypatch, tmp_path):
    argv = ["/somewhere/benchmarks/__main__.py", "--only", "memory"]
    monkeypatch.setattr(record.sys, "argv", argv)
    saved = json.loads(record.save("part", {"x": 1}, tmp_path / "new").read_text())
    assert saved["measured"] == {"x": 1}
    assert saved["command"] == "python -m benchmarks --only memory"
    assert {"date", "commit", "machine", "versions"} < saved.keys()


def test_a_commit_is_marked_if_anything_but_results_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    assert record.commit() is None
    record.RESULTS.mkdir(parents=True)
    for path in (tmp_path / "code.py", record.RESULTS / "one.json"):
        path.write_text("1")
    for arguments in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "-m", "m"),
    ):
        record.git(*arguments)
    (record.RESULTS / "one.json").write_text("2")
    (record.RESULTS / "new.json").write_text("2")
    clean = record.commit()
    assert clean == record.git("rev-parse", "--short", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert record.commit() == f"{clean}-dirty"


def test_growth_picture_shows_every_side():
    sides = [side for side in figures.COLORS if side != figures.COPY]
    steps = [
        {"n": n, "side": side, "seconds": spread(n * 1e-6)}
        for n in (1, 10)
        for side in figures.COLORS
    ]
    before = [
        {"shapes": shapes, "n": n, "side": side}
        | {"trace_and_lower": spread(n * 2e-3), "compile": spread(n * 5e-3)}
        for shapes in (stages.ONE_SHAPE, stages.ALL_DIFFERENT, "a model")
        for n in (1, 10)
        for side in sides
    ]
    missing = {"n": 1, "side": sides[0], "not_measured": "not installed"}
    rows = {"elements": [*steps, missing], "leaves": steps}
    figure = figures.growth({"total": 10, "rows": rows}, {"rows": before})
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == [*sides, figures.COPY_LABEL]
    for panel, expected in ((2, [2e-3, 2e-2]), (3, [5e-3, 5e-2])):
        lines = figure.axes[panel].lines
        assert len(lines) == 2 * len(sides)
        np.testing.assert_allclose(np.asarray(lines[-1].get_ydata()), expected)


def test_a_format_that_an_optimizer_lacks_is_blank_and_not_counted(results):
    def row(optimizer, format, *losses):
        cell = {"task": "net", "optimizer": optimizer, "decay": 1, "format": format}
        return cell | {"train_loss": losses, "validation_loss": losses}

    rows = [
        row("Adam", "float32", 1.0, 2.0, 3.0),
        row("Adam", "one", 1.0, 2.0, 3.0),
        row("Adam", "two", 3.0, 4.0, 5.0),
        row("Lion", "float32", 1.0, 2.0, 3.0),
        row("Lion", "one", 3.5, 3.5, 3.5),
    ]
    content = HEADER | {"measured": {"rows": rows}}
    (results / "first_moments.json").write_text(json.dumps(content))
    assert body(results, "first_moments") == [
        "| net | Adam | 2.0 ± 1.0 / 2.0 ± 1.0 | +0.0 / +0.0 | **+2.0** / **+2.0** |",
        "| net | Lion | 2.0 ± 1.0 / 2.0 ± 1.0 | **+1.5** / **+1.5** |  |",
        "| outside |  |  | 2 of 4 | 2 of 2 |",
    ]


def test_time_and_ratio_of_processes_that_take_turns(results):
    (results / "update_step.cpu.json").rename(results / "one_pass.cpu.json")
    assert body(results, "one_pass_cpu") == [
        "| plain | `ours` | 3.00 (2.70 to 3.30), 1.00 |",
        "| plain | `theirs` | 6.00 (5.40 to 6.60), 2.00 |",
        "| plain | `missing` | not installed |",
    ]
