# SPDX-License-Identifier: Apache-2.0
"""The modules, from the top down. Each may import only from those below it.

dialects and recipes speak other frameworks' words and published settings, `_rmsprop`
is the optimizer, `_scale_by_rms` the mathematics, the wrappers know nothing of RMSProp.
"""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "optax_rms"
LAYERS = [
    ["__init__"],
    ["recipes"],
    ["dialects.__init__"],
    ["dialects.torch", "dialects.keras", "dialects.tensorflow", "dialects.optax"],
    [
        "dialects._keras_variables",
        "dialects._tensorflow_checkpoint",
        "dialects._torch_state_dict",
    ],
    [
        "dialects._keras_optimizer",
        "dialects._tensorflow_optimizers",
        "dialects._torch_optimizers",
    ],
    ["dialects._gradient_clipping", "dialects._handover", "dialects._keras_schedules"],
    ["_rmsprop"],
    ["_scale_by_rms"],
    ["_master_weights", "_compress_state"],
    ["_leafwise", "_minifloat"],
    ["_checks"],
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
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "optax_rms"
        ):
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
