# SPDX-License-Identifier: Apache-2.0
"""The license line of every source file, and the paths that the guides name."""

import pathlib
import re

import pytest

from optax_rms import dialects

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ["benchmarks", "docs", "examples", "optax_rms", "tests"]
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
LISTS = ["docs/where_things_go.md", "docs/add_a_dialect.md"]
GUIDES = ["CONTRIBUTING.md", "SECURITY.md", *LISTS]


def test_every_source_file_begins_with_its_license():
    line = "# SPDX-License-Identifier: Apache-2.0\n"
    missing = [p for p in SOURCES if not p.read_text().startswith(line)]
    assert not missing, f"the first line must be {line!r}"


@pytest.mark.parametrize("guide", GUIDES)
def test_paths_in_guides_exist(guide):
    text = (ROOT / guide).read_text()
    named = re.findall(r"(?:optax_rms|tests|docs|benchmarks|examples)/[\w./]+", text)
    # NAME and FOLDER are the reader's to fill in.
    paths = {path.rstrip(".") for path in named if not re.search("NAME|FOLDER", path)}
    missing = [path for path in sorted(paths) if not (ROOT / path).exists()]
    assert not missing, f"{guide} names paths that do not exist"


@pytest.mark.parametrize("guide", LISTS)
def test_lists_of_files_name_what_the_tests_call_so(guide):
    """Names in backticks that stand beside a path, for example `RULES`."""
    text = (ROOT / guide).read_text()
    steps = re.findall(r"^\d\. `([\w/]+\.py)`((?:.*\n)(?: {3}.*\n)*)", text, re.M)
    assert steps
    for path, step in steps:
        if "NAME" in path:
            continue
        source = (ROOT / path).read_text()
        for name in re.findall(r"`([A-Z]{4,}|[A-Z][a-z]+|test_\w+)`", step):
            assert name in source, f"{path} has no {name}"


def test_the_form_of_a_dialect_lists_every_optimizer():
    form = (ROOT / ".github/ISSUE_TEMPLATE/dialect.yml").read_text()
    listed = set(re.findall(r"- (dialects\.\w+\.\w+)", form))
    assert listed == {
        f"dialects.{framework}.{name}"
        for framework in ("keras", "optax", "tensorflow", "torch")
        for name in getattr(dialects, framework).__all__
        if "rmsprop" in name
    }
