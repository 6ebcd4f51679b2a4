# SPDX-License-Identifier: Apache-2.0
"""Renders the tables and pictures of README and docs from the result files.

    python -m benchmarks.report                    # rewrite them
    python -m benchmarks.report --check            # fail if a table is not up to date
    python -m benchmarks.report --results FOLDER   # print the tables of other results

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
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
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.leaves import LEAF_SETS
from benchmarks.record import RESULTS, ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
IMAGES = ROOT / "docs" / "images"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
DEVICES = ("cpu", "h100", "h200")
STAGES = ("trace", "lower", "compile")
NOT_MEASURED = "not measured"

LOSSES = ("train_loss", "validation_loss")

Cell = Callable[[dict[str, Any], list[dict[str, Any]]], str]
TrainingCell = tuple[str, str, float]


def drift(results: pathlib.Path) -> str:
    result = read(results, "fidelity")
    if result is None:
        return f"{NOT_MEASURED}\n"
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
    head = ("a run of", "version", "`optax.rmsprop`, same numbers", "its dialect here")
    return markdown(head, rows)


def centered_nan(results: pathlib.Path) -> str:
    result = read(results, "fidelity")
    if result is None:
        return f"{NOT_MEASURED}\n"
    rows = [
        (f"`{name}`", version_of(name, result["versions"]), str(count))
        for name, count in result["measured"]["centered_nan"].items()
    ]
    return markdown(("centered", "version", "NaN weights of 1,000"), rows)


def update_step(results: pathlib.Path, device: str, cell: Cell) -> str:
    """A row for each side of each comparison, a column for each set of leaves."""
    result = read(results, f"update_step.{device}")
    if result is None:
        return f"{NOT_MEASURED}\n"
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
    return markdown(("comparison", "", *columns), rows)


def milliseconds(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    del group
    keys = ("median", "lower_quartile", "upper_quartile")
    median, lower, upper = (significant(1e3 * row["seconds"][key]) for key in keys)
    return f"{median} ({lower} to {upper})"


def multiple_of_limit(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    copy = next(r for r in group if r["side"] == "copy")
    bandwidth = copy["moved_bytes"] / copy["seconds"]["median"]
    return f"{row['seconds']['median'] * bandwidth / row['moved_bytes']:.2f}"


def relative(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """Time over that of the first side of the comparison."""
    first = next(r for r in group if r["side"] != "copy")
    return f"{row['seconds']['median'] / first['seconds']['median']:.2f}"


# Comparison, side, those whose fastest it is measured by, and the share of its time
# that is the aim; `None` where there is no aim.
AIMS = (
    ("JAX", "optax_rms.rmsprop", ("optax.rmsprop",), 1.02),
    (
        "PyTorch",
        "optax_rms.rmsprop",
        ("torch.optim.RMSprop, foreach=False", "torch.optim.RMSprop, foreach=True"),
        0.35,
    ),
    (
        "PyTorch",
        "optax_rms.rmsprop",
        ("torch.optim.RMSprop, torch.compile",),
        None,
    ),
    ("storage formats", "optax_rms.rmsprop, nu=UE6M2", ("optax_rms.rmsprop",), 1.25),
)


def aims(results: pathlib.Path) -> str:
    """What was aimed at on a CPU and what was reached; in bold where it was not."""
    result = read(results, "update_step.cpu")
    if result is None:
        return f"{NOT_MEASURED}\n"
    medians = {
        (row["comparison"], row["leaves"], row["side"]): row["seconds"]["median"]
        for row in result["measured"]["rows"]
        if "seconds" in row
    }
    columns = list(dict.fromkeys(leaves for _, leaves, _ in medians))
    rows = []
    for comparison, side, others, aim in AIMS:
        texts = []
        for leaves in columns:
            cells = [(comparison, leaves, other) for other in others]
            times = [medians[cell] for cell in cells if cell in medians]
            if not times:
                texts.append(NOT_MEASURED)
                continue
            ratio = medians[comparison, leaves, side] / min(times)
            is_missed = aim is not None and ratio > aim
            texts.append(f"**{ratio:.2f}**" if is_missed else f"{ratio:.2f}")
        names = " or ".join(f"`{other}`" for other in others)
        rows.append((f"`{side}`", names, str(aim or ""), *texts))
    return markdown(("time of", "over that of", "at most", *columns), rows)


def memory(results: pathlib.Path, device: str) -> str:
    result = read(results, f"memory.{device}")
    if result is None:
        return f"{NOT_MEASURED}\n"
    columns = ("state", "limit", "accessed", "temporary", "allocator_peak")
    rows = []
    for row in result["measured"]["rows"]:
        reason = row.get("not_measured")
        texts = (reason or per_parameter(row[column]) for column in columns)
        rows.append((f"`{row['side']}`", row["dtype"], *texts))
    head = ("", "parameters", "state", "must move", "moves", "temporary", "peak")
    return markdown(head, rows)


def compiled(results: pathlib.Path) -> str:
    """A row for each optimizer, with what its programs for all devices need."""
    result = read(results, "compiled")
    if result is None:
        return f"{NOT_MEASURED}\n"
    leaves = result["measured"]["leaves"]
    columns = {
        "moved": "moves",
        "temporary": "temporary",
        "collectives": "collectives",
        "kernels": f"kernels for {leaves} leaves",
    }
    head = dict.fromkeys(("", "parameters", "must move"))
    cells: dict[tuple[str, ...], list[str]] = {}
    for row in result["measured"]["rows"]:
        key = f"`{row['side']}`", row["dtype"], per_parameter(row["limit"])
        for column, name in columns.items():
            if column in row:
                head[f"{row['device']}: {name}"] = None
                cells.setdefault(key, []).append(per_parameter(row[column]))
    rows = [(*key, *texts) for key, texts in cells.items()]
    return markdown(tuple(head), rows)


def growth(results: pathlib.Path, device: str) -> str:
    """The picture, which `benchmarks.figures` draws."""
    if read(results, f"growth.{device}") is None:
        return f"{NOT_MEASURED}\n"
    return f"![Growth of the times, {device}](images/growth.{device}.png)\n"


def quality(results: pathlib.Path, name: str = "quality") -> str:
    """How far each format is from float32, in standard deviations over the seeds."""
    result = read(results, name)
    if result is None:
        return f"{NOT_MEASURED}\n"
    cells = by_cell(result["measured"]["rows"])
    formats = list(dict.fromkeys(format for cell in cells.values() for format in cell))
    outside = dict.fromkeys(formats[1:], 0)
    rows = []
    for (task, optimizer, decay), cell in cells.items():
        exact = cell["float32"]
        texts = [optimizer if decay == 1 else f"{optimizer} {decay:g}"]
        texts.append(" / ".join(spread(exact[loss]) for loss in LOSSES))
        for format in outside:
            changes = [deviations(cell[format], exact, loss) for loss in LOSSES]
            outside[format] += sum(abs(x) > 1 for x in changes)
            texts.append(" / ".join(map(marked, changes)))
        rows.append((task, *texts))
    summary = (f"{n} of {2 * len(rows)}" for n in outside.values())
    head = ("", "", "float32: training / validation loss", *outside)
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
    if result is None:
        return f"{NOT_MEASURED}\n"
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
    return markdown(("", "", *list(formats)[1:]), rows)


def stages(results: pathlib.Path, device: str) -> str:
    """Time of `optax_rms.rmsprop` before its first step, over that of Optax."""
    grown, steps = (read(results, f"{p}.{device}") for p in ("growth", "update_step"))
    if grown is None or steps is None:
        return f"{NOT_MEASURED}\n"
    names = {"one shape": "one shape", "all shapes": "all different"}
    samples: dict[tuple[str, str], dict[str, list[list[float]]]] = {}
    for kind, name in names.items():
        for row in grown["measured"]["rows"][f"stages, {kind}"]:
            cell = samples.setdefault((name, f"{row['n']:,}"), {})
            times = [row[stage]["median"] for stage in STAGES]
            cell.setdefault(row["side"], []).append(times)
    for row in steps["measured"]["rows"]:
        if times := row.get("compile_seconds"):
            count = len(LEAF_SETS.get(row["leaves"], []))
            cell = samples.setdefault((row["leaves"], f"{count:,}"), {})
            cell.setdefault(row["side"], []).append([times.get(s, 0) for s in STAGES])
    rows = []
    for cell, sides in samples.items():
        (*ours, our_compile), (*theirs, their_compile) = (
            map(statistics.median, zip(*sides[side], strict=True))
            for side in ("optax_rms.rmsprop", "optax.rmsprop")
        )
        ratios = sum(ours) / sum(theirs), our_compile / their_compile
        rows.append((*cell, *(f"{ratio:.2f}" for ratio in ratios)))
    return markdown(("shapes", "leaves", "trace and lower", "compile"), rows)


def origin(results: pathlib.Path, device: str) -> str:
    """Where and when the parts were measured on a device."""
    parts = ("update_step", "growth", "memory")
    return origin_of(results, *(f"{part}.{device}" for part in parts))


def origin_of(results: pathlib.Path, *names: str) -> str:
    rows = []
    for result in filter(None, (read(results, name) for name in names)):
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v)
        machine = result["machine"]
        where = f"{machine['device']}, {machine['cores']} cores"
        command = f"`{result['command']}`"
        rows.append((command, where, result["date"], str(result["commit"]), versions))
    head = ("command", "machine", "date", "commit", "versions")
    return markdown(head, rows) if rows else f"{NOT_MEASURED}\n"


def read(results: pathlib.Path, name: str) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def version_of(api: str, versions: dict[str, str]) -> str:
    return versions[re.split(r"[. ]", api)[0].replace("_", "-")]


def deviations(row: dict[str, Any], exact: dict[str, Any], key: str) -> float:
    """How much higher a mean is than in float32, in its standard deviations there."""
    change = statistics.mean(row[key]) - statistics.mean(exact[key])
    return change / statistics.stdev(exact[key])


def marked(x: float) -> str:
    """With its sign, and bold beyond one."""
    text = f"{x:+.1f}"
    return f"**{text}**" if abs(x) > 1 else text


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, to two figures of the latter."""
    deviation = statistics.stdev(values)
    digits = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def percent(fraction: float) -> str:
    digits = max(0, -math.floor(math.log10(100 * fraction)))
    return f"{100 * fraction:.{digits}f} %"


def significant(x: float) -> str:
    """Three significant figures."""
    digits = max(0, 2 - math.floor(math.log10(x))) if x else 0
    return f"{x:.{digits}f}"


def per_parameter(n: float | None) -> str:
    return "" if n is None else f"{round(n, 3):.3g}"


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, Callable[[pathlib.Path], str]] = {
    "drift": drift,
    "centered_nan": centered_nan,
    "quality": quality,
    "quality_repeated": functools.partial(quality, name="quality_repeated"),
    "stored_roots": stored_roots,
    "aims": aims,
    "compiled": compiled,
    "origin_compiled": lambda results: origin_of(results, "compiled"),
    "origin_quality": lambda results: origin_of(results, "quality", "quality_repeated"),
}
OF_DEVICE: dict[str, tuple[str, Callable[..., str]]] = {
    "origin": ("", origin),
    "times": (
        "Milliseconds per step:",
        functools.partial(update_step, cell=milliseconds),
    ),
    "limits": (
        "As multiples of the limit:",
        functools.partial(update_step, cell=multiple_of_limit),
    ),
    "ratios": (
        "As multiples of the first row of the comparison:",
        functools.partial(update_step, cell=relative),
    ),
    "memory": ("Bytes per parameter:", memory),
    "growth": ("Growth:", growth),
    "stages": ("Time before the first step, over Optax's:", stages),
}


def all_of_device(results: pathlib.Path, device: str) -> str:
    texts = [(title, table(results, device)) for title, table in OF_DEVICE.values()]
    if all(text == f"{NOT_MEASURED}\n" for _, text in texts):
        return f"{NOT_MEASURED}\n"
    return "\n".join(f"{title}\n\n{text}" for title, text in texts).lstrip()


for _device in DEVICES:
    TABLES[f"all_{_device}"] = functools.partial(all_of_device, device=_device)
    for _name, (_, _table) in OF_DEVICE.items():
        TABLES[f"{_name}_{_device}"] = functools.partial(_table, device=_device)


def rendered(page: str, results: pathlib.Path = RESULTS) -> str:
    """The text of a page with every table in it made anew."""
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
    # So that --check does without matplotlib.
    from benchmarks import figures

    for device in DEVICES:
        result = read(results, f"growth.{device}")
        if result is not None:
            figures.growth(result["measured"]).savefig(images / f"growth.{device}.png")


if __name__ == "__main__":
    sys.exit(main())
