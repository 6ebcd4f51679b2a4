# SPDX-License-Identifier: Apache-2.0
"""The README and the docs: their code runs, their links lead somewhere."""

import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks():
    for page in PAGES:
        if page.name.startswith("continue_from_"):
            # Needs another framework, and runs beside the parity tests of its dialect.
            continue
        text = page.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{page.name}:{line}")


@pytest.mark.parametrize("code", list(code_blocks()))
def test_code_runs(code):
    with jax.numpy_dtype_promotion("standard"):  # as it is for a reader
        exec(compile(code, "<page>", "exec"), {})


def test_readme_names_the_commands_that_newcomers_run():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[examples]" && python examples/train_digits.py' in text
    assert 'pip install -e ".[test]" && pytest' in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_tables_are_those_of_the_result_files():
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    stale = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stale.returncode == 0, stale.stdout + stale.stderr
