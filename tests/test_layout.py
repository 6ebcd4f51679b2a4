# SPDX-License-Identifier: Apache-2.0
"""The modules, from the top down. Each may import only from those below it.

dialects and recipes speak other frameworks' words and published settings, `_rmsprop`
is the optimizer, `_scale_by_rms` the mathematics, whose states monitoring reads. The
wrappers of storage know nothing of RMSProp.
"""

import ast
import importlib
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

import optax_rms

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "optax_rms"
LAYERS = [
    ["__init__"],
    ["recipes.__init__"],
    ["recipes._citations"],
    [
        "recipes._generative",
        "recipes._laprop",
        "recipes._physics",
        "recipes._reinforcement_learning",
        "recipes._sequences",
        "recipes._vision",
    ],
    ["recipes._schedules"],
    ["dialects.__init__"],
    [
        "dialects.torch.__init__",
        "dialects.keras.__init__",
        "dialects.tensorflow.__init__",
        "dialects.optax",
    ],
    [
        # Checkpoints of TensorFlow hold optimizers of Keras as well.
        "dialects.tensorflow._handover",
    ],
    ["dialects.torch._handover", "dialects.keras._handover"],
    ["dialects.torch._saved", "dialects.keras._saved", "dialects.tensorflow._saved"],
    ["dialects.tensorflow._object_graph"],
    [
        "dialects.torch._optimizers",
        "dialects.keras._optimizers",
        "dialects.tensorflow._optimizers",
    ],
    [
        "dialects.keras._schedules",
        "dialects.torch._schedules",
        "dialects._shared.chain_state",
        "dialects._shared.clipping",
        "dialects._shared.converter",
        "dialects._shared.slots",
    ],
    ["dialects._shared.variances"],
    [
        "dialects._shared.inverse",
        "dialects._shared.keras_files",
        "dialects._shared.plain_state",
        "dialects._shared.problems",
        "dialects._shared.reading",
    ],
    ["dialects._shared.__init__"],
    ["_adapt_state", "_rmsprop"],
    ["monitoring.__init__"],
    ["monitoring._monitor"],
    ["monitoring._step_report"],
    ["monitoring._effective_rates", "monitoring._leaf_figures", "monitoring._table"],
    ["monitoring._figures", "monitoring._told_by_state"],
    ["monitoring._count_extremes"],
    ["_scale_by_rms"],
    ["placement.__init__"],
    ["placement._one_pass", "placement._shard_state"],
    ["placement._state_shardings"],
    ["storage.__init__"],
    ["storage._seed_rounding"],
    ["storage._master_weights", "storage._compress_state"],
    ["storage._residuals"],
    ["storage._fingerprint", "storage._formats", "storage._rounding"],
    ["_leafwise"],
    ["_schedules"],
    ["_checks"],
    ["_alike"],
    ["_leaf_names", "_numerics", "_types"],
]
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
)


def imports_of(module):
    """The modules of the package that ``module`` names in its import statements."""
    tree = ast.parse(
        (PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text()
    )
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.startswith("optax_rms"):
            parent = node.module.removeprefix("optax_rms").removeprefix(".")
            for name in [alias.name for alias in node.names]:
                child = f"{parent}.{name}".removeprefix(".")
                candidates = (child, f"{child}.__init__", parent, f"{parent}.__init__")
                yield next((c for c in candidates if c in MODULES), "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward(module):
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    assert module in layer, f"{module} has no place in the list of layers"
    for imported in imports_of(module):
        assert layer[imported] > layer[module], f"{module} imports {imported}"


def test_names_of_test_files_occur_once():
    """A file in a message, or in a command, is found by its name alone."""
    names = [p.name for p in TESTS.rglob("*.py") if p.name != "conftest.py"]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_import_needs_only_the_runtime_dependencies():
    """No other framework, nor anything of an extra, is imported with the library."""
    extras = ("torch", "keras", "tensorflow", "flax", "h5py", "matplotlib", "sklearn")
    code = (
        "import sys, optax_rms\n"
        "for name in dir(optax_rms): getattr(optax_rms, name)\n"
        f"print([name for name in {extras} if name in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_import_asks_for_no_device():
    """`jax.distributed.initialize` and `jax.config.update` may come after it."""
    code = "".join(f"import optax_rms.{module}\n" for module in MODULES)
    environment = os.environ | {"JAX_PLATFORMS": "no_such_device"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


PUBLIC = [
    "optax_rms" + f".{m}".removesuffix("__init__").rstrip(".")
    for m in MODULES
    if not any(part.startswith("_") for part in m.removesuffix("__init__").split("."))
]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_modules_list_their_names(module):
    names = importlib.import_module(module)
    own = {
        name
        for name, value in vars(names).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith(module)
    }
    assert len(names.__all__) == len(set(names.__all__))
    assert own <= set(names.__all__) <= set(vars(names))


REFERENCE = "".join(
    page.read_text() for page in (PACKAGE.parent / "docs" / "api").glob("*.rst")
)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_in_the_reference(module):
    """Under the path at which users import them: the top level, a dialect, recipes."""
    if f".. automodule:: {module}\n" in REFERENCE:
        return
    names = importlib.import_module(module)
    for name in names.__all__:
        value = getattr(names, name)
        if isinstance(value, types.ModuleType):
            continue
        is_at_the_top = getattr(optax_rms, name, None) is value
        path = f"{'optax_rms' if is_at_the_top else module}.{name}"
        directive = rf":: {re.escape(path)}(?:\(.*\))?\n"
        assert re.search(directive, REFERENCE), path
