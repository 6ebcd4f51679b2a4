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

# A process keeps the programs that it compiled: about 4 GB after half of the tests.
MOST_PROCESSES = 4


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """The whole suite runs in parallel, tests that a command names in one process."""
    if config.args_source != config.ArgsSource.TESTPATHS:
        return 0
    return min(MOST_PROCESSES, os.cpu_count() or 1)


# Doctests, which are not below this folder, run as users do, without it.
@pytest.fixture(scope="module", autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def pytest_collection_modifyitems(items):
    for item in items:
        # Parallel processes must collect the same names.
        assert " at 0x" not in item.nodeid, f"a name with an address: {item.nodeid}"
        if item.path.stem.endswith("_parity"):
            item.add_marker("parity")
