# SPDX-License-Identifier: Apache-2.0
"""A missing framework is a skip for a newcomer and an error where it must be there."""

import sys

import pytest
from helpers import frameworks


@pytest.fixture(params=[frameworks.require, frameworks.require_submodule])
def require(request):
    return request.param


def test_missing_framework_is_skipped(require, monkeypatch):
    monkeypatch.delenv("OPTAX_RMS_REQUIRE_PARITY", raising=False)
    with pytest.raises(pytest.skip.Exception, match="not_installed"):
        require("not_installed.optim.module")


def test_missing_framework_is_an_error_where_it_is_required(require, monkeypatch):
    monkeypatch.setenv("OPTAX_RMS_REQUIRE_PARITY", "1")
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        require("not_installed.optim.module")


@pytest.fixture(name="broken")
def _broken(tmp_path, monkeypatch):
    """A package whose own modules work, and whose __init__ wants what is missing."""
    package = tmp_path / "broken" / "optim"
    package.mkdir(parents=True)
    (tmp_path / "broken" / "__init__.py").write_text("import not_installed")
    (package / "__init__.py").write_text("import not_installed")
    (package / "_helper.py").write_text("answer = 42")
    (package / "module.py").write_text("from ._helper import answer")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("OPTAX_RMS_REQUIRE_PARITY", raising=False)


@pytest.mark.usefixtures("broken")
def test_broken_framework_is_always_an_error():
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        frameworks.require("broken.optim.module")


@pytest.mark.usefixtures("broken")
def test_submodule_of_a_broken_framework():
    module = frameworks.require_submodule("broken.optim.module")
    assert module.answer == 42
    assert not [name for name in sys.modules if name.startswith("broken")]
