# SPDX-License-Identifier: Apache-2.0
"""Renders the tables and pictures of README and docs from the result files.

    python -m benchmarks.report                    # rewrite them
    python -m benchmarks.report --check            # fail if a table is not up to date
    python -m benchmarks.report --results FOLDER   # print the tables of other results

A table is between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
IMAGES = ROOT / "docs" / "images"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
DEVICES = ("cpu", "h100", "h200")
GROWTH_PARTS = ("growth", "stages")

DAMAGE_COLUMNS = {
    "cases": "cases",
    "previous_restored": "checkpoint before it restored",
    "orbax_raised": "Orbax alone: error",
    "orbax_restored": "Orbax alone: right bits",
    "orbax_restored_other_bits": "Orbax alone: wrong bits, silently",
}

LOSSES = ("train_loss", "validation_loss")

Cell = Callable[[dict[str, Any], list[dict[str, Any]]], str]
TrainingCell = tuple[str, str, float]


def drift(results: pathlib.Path) -> str:
    result = read(results, "fidelity")
    versions = result["versions"]
    rows = [
        (
            f"`{row['framework']}`",
            version_of(row["framework"], versions),
            percent(row["optax"]),
            percent(row["dialect"]),
        )
        for row in result["measured"]["drift"]
    ]
    head = (
        "a run of",
        "version",
        "drift with `optax.rmsprop`, %",
        "drift with its dialect, %",
    )
    return markdown(head, rows)


def centered(results: pathlib.Path) -> str:
    result = read(results, "fidelity")
    rows = [
        (
            f"`{row['optimizer']}`",
            version_of(row["optimizer"], result["versions"]),
            "yes" if row["centered"] else "no",
            f"`{np.format_float_scientific(row['eps'], trim='-', exp_digits=1)}`",
            str(row["nan_weights"]),
            two_figures(row["longest_step"]),
        )
        for row in result["measured"]["centered"]
    ]
    head = (
        *("optimizer", "version", "centered", "eps"),
        *("NaN weights of 1,000", "longest step, learning rates"),
    )
    return markdown(head, rows)


def dreamer(results: pathlib.Path) -> str:
    """Mean steps relative to float32: a row per format, a column per gradient."""
    result = read(results, "dreamer")
    measured = result["measured"]
    scales = [f"{cell['scale']:.0e}" for cell in measured["float32"]]
    rows = [
        (f"`{name}`", *(f"{cell['relative_step']:.3g}" for cell in cells))
        for name, cells in measured.items()
        if name != "float32"
    ]
    return markdown(("format", *(f"`{scale}`" for scale in scales)), rows)


def update_step(
    results: pathlib.Path, device: str, cell: Cell, part: str = "update_step"
) -> str:
    """A row for each side of each comparison, a column for each set of leaves."""
    result = read(results, f"{part}.{device}")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["measured"]["rows"]:
        groups.setdefault((row["comparison"], row["leaves"]), []).append(row)
    for (comparison, leaves), group in groups.items():
        for row in group:
            text = row.get("not_measured") or cell(row, group)
            cells.setdefault((comparison, row["side"]), {})[leaves] = text
    columns = list(dict.fromkeys(leaves for _, leaves in groups))
    rows = [
        (comparison, f"`{side}`", *(texts[leaves] for leaves in columns))
        for (comparison, side), texts in cells.items()
        if side != "copy"
    ]
    return markdown(("comparison", "optimizer", *columns), rows)


def milliseconds(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    del group
    return with_quartiles(row["seconds"], unit=1e-3)


def multiple_of_limit(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    copy = next(r for r in group if r["side"] == "copy")
    bandwidth = copy["moved_bytes"] / copy["seconds"]["median"]
    return f"{row['seconds']['median'] * bandwidth / row['moved_bytes']:.2f}"


def relative(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """Time over that of the first side of the comparison."""
    first = next(r for r in group if r["side"] != "copy")
    return f"{row['seconds']['median'] / first['seconds']['median']:.2f}"


def both(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """Milliseconds, and the multiple of the first side, if that was measured."""
    time = milliseconds(row, group)
    return time if "not_measured" in group[0] else f"{time}, {relative(row, group)}"


def over_limit(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """Milliseconds, and the multiple of the limit."""
    return f"{milliseconds(row, group)}, {multiple_of_limit(row, group)}"


def memory(results: pathlib.Path, device: str) -> str:
    result = read(results, f"memory.{device}")
    columns = ("state", "limit", "accessed", "temporary", "allocator_peak")
    rows = []
    for row in result["measured"]["rows"]:
        reason = row.get("not_measured")
        texts = (reason or per_parameter(row[column]) for column in columns)
        rows.append((f"`{row['side']}`", row["dtype"], *texts))
    head = (
        "optimizer",
        "parameters",
        "state",
        "must move",
        "moves",
        "temporary",
        "peak",
    )
    return markdown(head, rows)


def compiled(results: pathlib.Path) -> str:
    """A row for each optimizer, with the bytes and kernels of its compiled programs."""
    result = read(results, "compiled")
    leaves = result["measured"]["leaves"]
    columns = {
        "moved": "moves",
        "temporary": "temporary",
        "collectives": "collectives",
        "kernels": f"kernels for {leaves} leaves",
    }
    head: dict[str, None] = dict.fromkeys(("optimizer", "parameters", "must move"))
    cells: dict[tuple[str, ...], list[str]] = {}
    for row in result["measured"]["rows"]:
        key = f"`{row['side']}`", row["dtype"], per_parameter(row["limit"])
        for column, name in columns.items():
            if column in row:
                head[f"{row['device']}: {name}"] = None
                cells.setdefault(key, []).append(per_parameter(row[column]))
    rows = [(*key, *texts) for key, texts in cells.items()]
    return markdown(tuple(head), rows)


def pod(results: pathlib.Path) -> str:
    """Megabytes on each chip, beside the floor, and collectives of the program."""
    result = read(results, "pod")
    columns = ("state", "floor", "moved", "temporary")
    rows = [
        (
            f"`{row['side']}`",
            row["dtype"],
            *(f"{row[column] / 1e6:.1f}" for column in columns),
            str(row["collectives"]),
        )
        for row in result["measured"]["rows"]
    ]
    head = (
        *("optimizer", "parameters"),
        *("state, MB", "must move, MB", "moves, MB", "temporary, MB"),
        "collectives",
    )
    return markdown(head, rows)


def same_bits(results: pathlib.Path) -> str:
    """For each transformation, its arrangements on several devices, in all."""
    result = read(results, "same_bits")
    rows = []
    for row in result["measured"]["rows"]:
        layouts = row["layouts"]
        compared, different, lone = (
            sum(layout[key] for layout in layouts)
            for key in ("compared", "different", "lone_different")
        )
        largest = max(layout["lone_largest"] for layout in layouts)
        rows.append(
            (
                row["row"],
                f"{compared:,}",
                str(different),
                _lone(lone, largest),
                str(max(layout["collectives"] for layout in layouts)),
            )
        )
    head = (
        *("transformation", "elements compared", "other bits"),
        *("other bits where a device has one element", "collectives"),
    )
    return markdown(head, rows)


def resumed(results: pathlib.Path) -> str:
    """For each storage format, the runs that went on from a checkpoint elsewhere."""
    result = read(results, "same_bits")
    rows = [
        (
            row["row"],
            chain["chain"],
            f"{chain['compared']:,}",
            str(chain["different"]),
            _lone(chain["lone_different"], chain["lone_largest"]),
        )
        for row in result["measured"]["resumed"]
        for chain in row["chains"]
    ]
    head = (
        *("transformation", "checkpoint", "elements compared", "other bits"),
        "other bits where a device has one element",
    )
    return markdown(head, rows)


def _lone(different: int, largest: float) -> str:
    return f"{different}, by at most {significant(largest)}" if different else "0"


def growth(results: pathlib.Path, device: str) -> str:
    """The picture, which `benchmarks.figures` draws."""
    for part in GROWTH_PARTS:
        read(results, f"{part}.{device}")
    return f"![Growth of the times, {device}](images/growth.{device}.png)\n"


def quality(results: pathlib.Path, name: str = "quality") -> str:
    """Differences of each format from float32, in standard deviations over seeds."""
    result = read(results, name)
    cells = by_cell(result["measured"]["rows"])
    formats = list(dict.fromkeys(format for cell in cells.values() for format in cell))
    outside = dict.fromkeys(formats[1:], 0)
    cells_of = dict.fromkeys(outside, 0)
    rows = []
    for (task, optimizer, decay), cell in cells.items():
        exact = cell["float32"]
        texts = [optimizer if decay == 1 else f"{optimizer} {decay:g}"]
        texts.append(" / ".join(spread(exact[loss]) for loss in LOSSES))
        for format in outside:
            if format not in cell:
                texts.append("")
                continue
            cells_of[format] += 2
            changes = [deviations(cell[format], exact, loss) for loss in LOSSES]
            outside[format] += sum(abs(x) > 1 for x in changes)
            texts.append(" / ".join(map(marked, changes)))
        rows.append((task, *texts))
    summary = (f"{n} of {cells_of[format]}" for format, n in outside.items())
    head = ("network", "optimizer", "float32: training / validation loss", *outside)
    return markdown(head, [*rows, ("outside", "", "", *summary)])


def by_cell(
    rows: list[dict[str, Any]],
) -> dict[TrainingCell, dict[str, dict[str, Any]]]:
    """Of each task, optimizer and decay, the row of each format."""
    cells: dict[TrainingCell, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cell = row["task"], row["optimizer"], row["decay"]
        cells.setdefault(cell, {})[row["format"]] = row
    return cells


def apart(rows: list[dict[str, Any]], formats: Iterable[str]) -> list[TrainingCell]:
    """The cells in which a mean loss of these formats is beyond one deviation."""
    return [
        cell
        for cell, row in by_cell(rows).items()
        if any(
            abs(deviations(row[format], row["float32"], loss)) > 1
            for format, loss in itertools.product(formats, LOSSES)
        )
    ]


def stored_roots(results: pathlib.Path) -> str:
    """Length of the steps and error of the roots, averaged over the seeds."""
    result = read(results, "quality")
    cells: dict[tuple[str, ...], list[str]] = {}
    formats = dict.fromkeys(row["format"] for row in result["measured"]["rows"])
    for row in result["measured"]["rows"]:
        if row["format"] == "float32":
            continue
        decay = "" if row["decay"] == 1 else f" {row['decay']:g}"
        texts = cells.setdefault((row["task"], row["optimizer"] + decay), [])
        length, bias, noise = (
            statistics.mean(row[key])
            for key in ("step_length", "root_bias", "root_noise")
        )
        texts.append(f"{100 * (length - 1):+.1f} %, {bias:+.2f} ± {noise:.2g}")
    rows = [(*cell, *texts) for cell, texts in cells.items()]
    return markdown(("network", "optimizer", *list(formats)[1:]), rows)


def stages(results: pathlib.Path, device: str) -> str:
    """Time before the first step, and ratios to that of Optax.

    All sides compiled the same leaves in the same rounds of one measurement.
    """
    result = read(results, f"stages.{device}")
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result["measured"]["rows"]:
        cell = cells.setdefault((row["shapes"], f"{row['n']:,}"), {})
        cell[row["side"]] = row
    ours, theirs = "optax_rms.rmsprop", "optax.rmsprop"
    byte = "optax_rms.rmsprop, nu=UE6M2"
    rows = []
    for cell, sides in cells.items():
        texts = []
        for stage in ("trace_and_lower", "compile"):
            unit = sides[theirs][stage]["median"]
            texts += [with_quartiles(sides[s][stage], unit=1) for s in (ours, theirs)]
            for side in (ours, byte):
                ratio = side in sides and f"{sides[side][stage]['median'] / unit:.2f}"
                texts.append(ratio or "")
        rows.append((*cell, *texts))
    ratios = ("ratio", "`nu=UE6M2`: ratio")
    head = (
        *("shapes", "leaves"),
        *("trace and lower, s", "Optax, s", *ratios),
        *("compile, s", "Optax, s", *ratios),
    )
    return markdown(head, rows)


def dqn(results: pathlib.Path) -> str:
    """The last fifth of the epochs of `examples/train_dqn.py`, over the seeds."""
    result = read(results, "train_dqn")

    def last_fifth(epochs: list[list[float]]) -> np.ndarray:
        return np.mean(epochs[-max(1, len(epochs) // 5) :], axis=0)

    runs = result["runs"]
    recipe = last_fifth(runs["recipes.dqn"]["return"])
    rows = []
    for name, run in runs.items():
        returns = last_fifth(run["return"])
        change = (
            spread(list(returns - recipe)) if run is not runs["recipes.dqn"] else ""
        )
        share = f"{last_fifth(run['ruled_by_eps']).mean():.0%}"
        rows.append(
            (f"`{name}`" if "." in name else name, spread(list(returns)), change, share)
        )
    head = ("RMSProp", "return", "minus that of `recipes.dqn`", "ruled by epsilon")
    return markdown(head, rows)


def origin_dqn(results: pathlib.Path) -> str:
    result = read(results, "train_dqn")
    versions = result["versions"] | {"gymnax": result["gymnax"]}
    row = (
        f"{result['seeds']}",
        f"{result['frames'][-1]:,}",
        f"{result['machine']['device']}, {result['machine']['cores']} cores",
        result["date"],
        ", ".join(f"{name} {number}" for name, number in versions.items()),
    )
    return markdown(("seeds", "frames", "machine", "date", "versions"), [row])


def kills(results: pathlib.Path) -> str:
    parts = reliability_part(results, "kills")
    alone, together = parts["alone"], parts["together"]
    rows = [
        (
            "a lone process",
            f"{alone['kills']}, of them {alone['while_writing']} while a checkpoint "
            "was written",
            f"{alone['ends']} runs, {alone['different_ends']} with other bits",
            f"{alone['bits_compared']:,}",
        ),
        (
            "one of two processes",
            f"{together['kills']}, after which the other ended "
            f"{together['ended_with_message']} times with a message, within "
            f"{together['longest_s_to_end']:g} s",
            f"1 run, {together['different_ends']} with other bits",
            f"{together['bits_compared']:,}",
        ),
    ]
    return markdown(("killed", "times", "ends", "bits compared"), rows)


def damaged_files(results: pathlib.Path) -> str:
    parts = reliability_part(results, "files")
    names = {
        "delete": "deleted",
        "truncate": "truncated",
        "flip_a_bit": "a bit flipped",
    }
    rows = [
        (names[kind], *(str(row.get(key, 0)) for key in DAMAGE_COLUMNS))
        for kind, row in parts["damaged"].items()
    ]
    return markdown(("a file is", *DAMAGE_COLUMNS.values()), rows)


def foreign_checkpoints(results: pathlib.Path) -> str:
    parts = reliability_part(results, "files")
    rows = [
        (row["checkpoint"], *map(yes_or_no, (row["refused"], row["unchanged"])))
        for row in parts["others"]
    ]
    return markdown(("checkpoint", "refused", "files unchanged"), rows)


def no_space(results: pathlib.Path) -> str:
    parts = reliability_part(results, "files")
    rows = [
        (
            row["obstacle"],
            f"`{textwrap.shorten(row['message'], 100, placeholder=' …')}`",
            *map(yes_or_no, (row["checkpoints_kept"], row["same_end_later"])),
        )
        for row in parts["no_space"]
    ]
    head = ("obstacle", "last message", "checkpoints kept", "same bits once it is gone")
    return markdown(head, rows)


def extreme_gradients(results: pathlib.Path) -> str:
    counts = reliability_part(results, "gradients")
    names = {
        "cases": "cases drawn",
        "finite_cases": "cases with finite gradients only, none of which gave NaN",
        "skipped_steps": "steps skipped by `optax.apply_if_finite`",
        "bits_compared": "bits of other elements compared",
    }
    rows = [(name, f"{counts[key]:,}") for key, name in names.items()]
    return markdown(("extreme gradients", "number"), rows)


def soak(results: pathlib.Path) -> str:
    parts = reliability_part(results, "soak")
    rows = []
    for row in parts["drift"]:
        bias, error = mean_and_error(row["bias"])
        rows.append(
            (
                f"`{row['format']}`",
                f"{row['steps']:,}",
                f"{100 * bias:+.2g} ± {100 * error:.1g}",
                f"{row['noise']:.2g}",
                f"{row['stated_noise']:g}",
            )
        )
    head = ("format", "steps", "bias, %", "noise", "noise in `Minifloat`")
    return markdown(head, rows)


def endurance(results: pathlib.Path) -> str:
    parts = reliability_part(results, "soak")
    memory, threads = parts["memory"], parts["threads"]
    crossings = parts["counters"]["crossings"]
    wrong = sum(row["to"] != row["expected"] for row in crossings)
    rows = [
        *(
            (
                f"weights with residuals of {row['residual_bits']} bits, "
                f"{row['steps']:,} steps",
                f"largest difference from float32 {row['largest_difference']:.2g}",
            )
            for row in parts["residuals"]
        ),
        (
            f"{len(crossings)} counters set before 2^31 and 2^32",
            f"{wrong} with another number than expected after 8 steps",
        ),
        (
            f"{memory['steps']:,} compiled steps called from Python",
            f"{memory['live_arrays_growth']} more arrays, "
            f"{memory['peak_growth_kib']} KiB more memory",
        ),
        (
            f"{threads['threads']} threads",
            f"{threads['different']} results with other bits than one thread",
        ),
    ]
    return markdown(("run", "result"), rows)


def reliability_part(results: pathlib.Path, name: str) -> dict[str, Any]:
    measured = read(results, "reliability")["measured"]
    if name not in measured:
        raise Missing
    return measured[name]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean of independent values, and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def yes_or_no(x: bool) -> str:
    return "yes" if x else "no"


def origin(results: pathlib.Path, device: str) -> str:
    """Where and when the parts were measured on a device."""
    steps = ("update_step", "one_pass", "eager", "calls")
    parts = (*steps, "growth", "memory", "stages")
    return origin_of(results, *(f"{part}.{device}" for part in parts))


def origin_of(results: pathlib.Path, *names: str) -> str:
    return origins(read(results, name) for name in names if has(results, name))


def origin_of_reliability(results: pathlib.Path) -> str:
    """The parts may have a command each, and are in one file."""
    return origins(read(results, "reliability")["measured"].values())


def origins(found: Iterable[dict[str, Any]]) -> str:
    rows = []  # One for each command, whose parts may have a file each.
    for result in found:
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
        machine = result["machine"]
        where = f"{machine['device']}, {machine['cores']} cores"
        command = f"`{result['command']}`"
        row = command, where, result["date"], str(result["commit"]), versions
        if row not in rows:
            rows.append(row)
    if not rows:
        raise Missing
    return markdown(("command", "machine", "date", "commit", "versions"), rows)


class Missing(Exception):
    """Nobody has measured what a table shows."""


def has(results: pathlib.Path, name: str) -> bool:
    return (results / f"{name}.json").exists()


def read(results: pathlib.Path, name: str) -> dict[str, Any]:
    if not has(results, name):
        raise Missing
    return json.loads((results / f"{name}.json").read_text())


def or_not_measured(table: Callable[[pathlib.Path], str], results: pathlib.Path) -> str:
    try:
        return table(results)
    except Missing:
        return "not measured\n"


def version_of(api: str, versions: dict[str, str]) -> str:
    return versions[re.split(r"[. ]", api)[0].replace("_", "-")]


def deviations(row: dict[str, Any], exact: dict[str, Any], key: str) -> float:
    """Mean minus that of float32, in standard deviations of float32."""
    change = statistics.mean(row[key]) - statistics.mean(exact[key])
    return change / statistics.stdev(exact[key])


def marked(x: float) -> str:
    """A number with its sign, bold beyond one."""
    text = f"{x:+.1f}"
    return f"**{text}**" if abs(x) > 1 else text


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, to two figures of the deviation."""
    deviation = statistics.stdev(values)
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def percent(fraction: float) -> str:
    """In percent, to one significant figure below 1 %; the unit is in the head."""
    digits = max(0, -math.floor(math.log10(100 * fraction)))
    return f"{100 * fraction:.{digits}f}"


def with_quartiles(seconds: dict[str, float], unit: float) -> str:
    """Median and quartiles, in a ``unit`` of so many seconds."""
    keys = ("median", "lower_quartile", "upper_quartile")
    median, lower, upper = (significant(seconds[key] / unit) for key in keys)
    return f"{median} ({lower} to {upper})"


def significant(x: float) -> str:
    """Three significant figures."""
    digits = max(0, 2 - math.floor(math.log10(x))) if x else 0
    return f"{x:.{digits}f}"


def two_figures(x: float) -> str:
    """Two significant figures, without an exponent: 3,600,000."""
    return f"{float(f'{x:.2g}'):,.10g}"


def per_parameter(n: float | None) -> str:
    return "" if n is None else f"{round(n, 3):.3g}"


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, Callable[[pathlib.Path], str]] = {
    "drift": drift,
    "centered": centered,
    "dreamer": dreamer,
    "quality": quality,
    "first_moments": functools.partial(quality, name="first_moments"),
    "quality_repeated": functools.partial(quality, name="quality_repeated"),
    "stored_roots": stored_roots,
    "compiled": compiled,
    "pod": pod,
    "origin_pod": lambda results: origin_of(results, "pod"),
    "same_bits": same_bits,
    "resumed": resumed,
    "origin_same_bits": lambda results: origin_of(results, "same_bits"),
    "dqn": dqn,
    "origin_dqn": origin_dqn,
    "origin_compiled": lambda results: origin_of(results, "compiled"),
    "kills": kills,
    "damaged_files": damaged_files,
    "foreign_checkpoints": foreign_checkpoints,
    "no_space": no_space,
    "extreme_gradients": extreme_gradients,
    "soak": soak,
    "endurance": endurance,
    "origin_reliability": origin_of_reliability,
    "origin_quality": lambda results: origin_of(results, "quality", "quality_repeated"),
    "origin_first_moments": lambda results: origin_of(results, "first_moments"),
}
OF_DEVICE: dict[str, Callable[..., str]] = {
    "origin": origin,
    "times": functools.partial(update_step, cell=milliseconds),
    "limits": functools.partial(update_step, cell=multiple_of_limit),
    "ratios": functools.partial(update_step, cell=relative),
    "one_pass": functools.partial(update_step, cell=both, part="one_pass"),
    "eager": functools.partial(update_step, cell=both, part="eager"),
    "calls": functools.partial(update_step, cell=over_limit, part="calls"),
    "memory": memory,
    "growth": growth,
    "stages": stages,
}
TABLES |= {
    f"{name}_{device}": functools.partial(table, device=device)
    for device in DEVICES
    for name, table in OF_DEVICE.items()
}
TABLES = {
    name: functools.partial(or_not_measured, table) for name, table in TABLES.items()
}


def rendered(page: str, results: pathlib.Path = RESULTS) -> str:
    """The text of a page with all tables rendered from the results."""
    return TABLE.sub(lambda m: f"{m[1]}{TABLES[m[2]](results)}{m[3]}", page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=pathlib.Path, help="not the committed ones")
    options = parser.parse_args(argv)
    if options.results:
        for name, table in TABLES.items():
            print(f"## {name}\n\n{table(options.results)}")
        draw(options.results, options.results)
        return 0
    stale = [page for page in PAGES if rendered(page.read_text()) != page.read_text()]
    for page in stale:
        if options.check:
            print(f"{page.relative_to(ROOT)}: run python -m benchmarks.report")
        else:
            page.write_text(rendered(page.read_text()))
    if not options.check:
        draw(RESULTS, IMAGES)
    return int(options.check and bool(stale))


def draw(results: pathlib.Path, images: pathlib.Path) -> None:
    # Imported here, because --check does not need matplotlib.
    from benchmarks import figures

    for device in DEVICES:
        names = [f"{part}.{device}" for part in GROWTH_PARTS]
        if all(has(results, name) for name in names):
            steps, before = (read(results, name)["measured"] for name in names)
            figure = figures.growth(steps, before)
            figure.savefig(images / f"growth.{device}.png")


if __name__ == "__main__":
    sys.exit(main())
