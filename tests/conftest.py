# SPDX-License-Identifier: Apache-2.0
"""Eight virtual devices and strict dtype promotion for the whole suite."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import pytest


# Doctests, which are not below this folder, run as users do, without it.
@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.endswith("_parity"):
            item.add_marker("parity")
