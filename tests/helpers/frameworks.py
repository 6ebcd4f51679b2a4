# SPDX-License-Identifier: Apache-2.0
"""The installed frameworks, for tests that compare the library with them."""

import importlib
import importlib.util
import os
import sys
from types import ModuleType

import pytest


def require(name: str) -> ModuleType:
    """Import a framework, or skip the calling module where it is missing.

    Only tests of parity need the frameworks, so that a newcomer can do without. With
    OPTAX_RMS_REQUIRE_PARITY=1 a missing framework is an error: for example, in CI.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        is_required = os.environ.get("OPTAX_RMS_REQUIRE_PARITY") == "1"
        if is_required or error.name != name.partition(".")[0]:
            raise
        pytest.skip(
            f'{name} is missing: pip install -e ".[parity]"', allow_module_level=True
        )


def require_submodule(name: str) -> ModuleType:
    """`require` a module without running the ``__init__`` of its packages.

    For example, `import timm` needs torchvision, and `timm.optim.rmsprop_tf` does not.
    """
    packages = name.split(".")[:-1]
    spec = importlib.util.find_spec(packages[0])
    if spec is None or packages[0] in sys.modules:
        return require(name)
    path = spec.submodule_search_locations or []
    for i in range(len(packages)):
        package = ModuleType(".".join(packages[: i + 1]))
        package.__path__ = [os.path.join(p, *packages[1 : i + 1]) for p in path]
        sys.modules[package.__name__] = package
    try:
        return importlib.import_module(name)
    finally:  # A later import of the package gets the whole of it.
        for module in [m for m in sys.modules if m.split(".")[0] == packages[0]]:
            del sys.modules[module]
