# SPDX-License-Identifier: Apache-2.0
"""Renders the tables of README and docs from the committed result files.

    python -m benchmarks.report            # rewrite them
    python -m benchmarks.report --check    # fail if one is not up to date

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import math
import re
import sys
from typing import Any

from benchmarks.record import RESULTS, ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def drift() -> str:
    result = read("fidelity")
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


def centred_nan() -> str:
    result = read("fidelity")
    rows = [
        (f"`{name}`", version_of(name, result["versions"]), str(count))
        for name, count in result["measured"]["centred_nan"].items()
    ]
    return markdown(("centred", "version", "NaN weights of 1,000"), rows)


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def version_of(api: str, versions: dict[str, str]) -> str:
    return versions[re.split(r"[. ]", api)[0].replace("_", "-")]


def percent(fraction: float) -> str:
    digits = max(0, -math.floor(math.log10(100 * fraction)))
    return f"{100 * fraction:.{digits}f} %"


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES = {table.__name__: table for table in (drift, centred_nan)}


def rendered(page: str) -> str:
    """The text of a page with every table in it made anew."""
    return TABLE.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", page)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    stale = [page for page in PAGES if rendered(page.read_text()) != page.read_text()]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)}: run python -m benchmarks.report")
        else:
            page.write_text(rendered(page.read_text()))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
