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
            # Whole programs of other libraries, which take seconds to compile.
            slow = re.search("^(from flax import nnx|import equinox)", match[1], re.M)
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(match[1], id=f"{page.name}:{line}", marks=marks)


PRINTED = re.compile(r"^print\(.*\)\n# (.*)$", re.MULTILINE)


@pytest.mark.parametrize("code", list(code_blocks()))
def test_code_runs_and_prints_its_comments(code, capsys):
    with jax.numpy_dtype_promotion("standard"):  # as it is for a reader
        exec(compile(code, "<page>", "exec"), {})
    assert capsys.readouterr().out.splitlines() == PRINTED.findall(code)


def test_readme_names_the_commands_that_newcomers_run():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[examples]" && python examples/train_digits.py' in text
    assert 'pip install -e ".[test]" && pytest' in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mathematics_within_a_line_ends_in_this_line(page):
    """Markdown takes a second line that begins with + or - for a list."""
    text = re.sub(
        r"^```.*?^```|`[^`\n]*`|\$\$.*?\$\$", "", page.read_text(), flags=re.M | re.S
    )
    for line in text.splitlines():
        assert line.count("$") % 2 == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_is_empty(page):
    assert "-->\nnot measured\n<!--" not in page.read_text()


def test_tables_are_those_of_the_result_files():
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    stale = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stale.returncode == 0, stale.stdout + stale.stderr
