# SPDX-License-Identifier: Apache-2.0
"""Whether one device and many give the same bits, on virtual devices of the CPU.

    python -m benchmarks.same_bits            # rewrites its file in benchmarks/results
    python -m benchmarks.same_bits --quick    # few steps, to a temporary folder

Every row of the contract (tests/helpers/contract_rows.py) and every storage format
trains on 1, 2, 4 and 8 devices, with parameters replicated, and sharded over one axis
and over two. Then compressed runs go on from an Orbax checkpoint on other devices.
"""

import argparse
import math
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import optax_rms
from benchmarks import record
from benchmarks.compiled import COLLECTIVE

STEPS = 200
DEVICES = 8
# The mesh does not divide one dimension of rows and columns, nor that of odd. Of lone,
# each of eight devices has one element.
SHAPES = {
    "matrix": (16, 24),
    "rows": (16, 7),
    "columns": (7, 16),
    "odd": (5,),
    "lone": (DEVICES,),
}
LONE = SHAPES["lone"]


def _compressed(**formats: optax_rms.Minifloat) -> optax.GradientTransformation:
    inner = optax_rms.rmsprop(0.01, 0.9, 1e-4, momentum=0.9)
    return optax_rms.compress_state(inner, **formats)


def _compressed_adam() -> optax.GradientTransformation:
    formats = {"mu": optax_rms.SE5M2, "nu": optax_rms.UE6M2}
    return optax_rms.compress_state(optax.adam(0.01), **formats)


def _split(bits: int) -> optax.GradientTransformation:
    inner = _compressed(nu=optax_rms.UE6M2)
    return optax_rms.split_master_weights(inner, residual_bits=bits)


Case = tuple[Callable[[], optax.GradientTransformation], str]
FORMATS: dict[str, Case] = {
    "RMSProp, nu=UE6M2, trace=SE5M2": (
        lambda: _compressed(nu=optax_rms.UE6M2, trace=optax_rms.SE5M2),
        "float32",
    ),
    "RMSProp, nu=UE8M8, trace=SE8M7": (
        lambda: _compressed(nu=optax_rms.UE8M8, trace=optax_rms.SE8M7),
        "float32",
    ),
    "optax.adam, mu=SE5M2, nu=UE6M2": (_compressed_adam, "float32"),
    "split_master_weights, 8 bits, nu=UE6M2": (lambda: _split(8), "bfloat16"),
    "split_master_weights, 16 bits, nu=UE6M2": (lambda: _split(16), "bfloat16"),
}
RESUMED = (
    "RMSProp, nu=UE6M2, trace=SE5M2",
    "optax.adam, mu=SE5M2, nu=UE6M2",
    "split_master_weights, 8 bits, nu=UE6M2",
)
# The shape of the mesh of each part of a run.
CHAINS = {
    "8 to 4 to 1 devices": [(4, 2), (2, 2), (1, 1)],
    "4 x 2 to 2 x 4 devices": [(4, 2), (2, 4)],
}
TWO_PROCESSES = "two processes of 4 devices to one of 1"


def cases() -> dict[str, Case]:
    """Rows of the contract, but for the row that is built for one mesh, and formats."""
    from tests.helpers.contract_rows import ROWS

    rows = {row.name: (row, "float32") for row in ROWS if row.name != "shard_state"}
    return rows | FORMATS


def specs(axes: tuple[str, ...]) -> dict[str, PartitionSpec]:
    """How the parameters are sharded over these axes: over none, one or two."""
    if not axes:
        return dict.fromkeys(SHAPES, PartitionSpec())
    return {
        "matrix": PartitionSpec(*axes),
        "rows": PartitionSpec(axes, None),
        "columns": PartitionSpec(None, axes),
        "odd": PartitionSpec(),
        "lone": PartitionSpec(axes),
    }


def mesh_of(shape: tuple[int, int]) -> Mesh:
    devices = jax.devices()[: math.prod(shape)]
    return Mesh(np.reshape(devices, shape), ("x", "y"))


def layouts() -> Iterable[tuple[str, tuple[int, int], tuple[str, ...]]]:
    """Name, shape of the mesh and axes of each arrangement of several devices."""
    for n in (2, 4, DEVICES):
        yield f"{n} devices, replicated", (n, 1), ()
        yield f"{n} devices, one axis", (n, 1), ("x",)
        if n > 2:
            yield f"{n} devices, two axes", (n // 2, 2), ("x", "y")


def data(steps: int, dtype: str) -> tuple[Any, Any]:
    """Parameters, and gradients of all steps: of many sizes, with zeros among them."""
    rng = np.random.default_rng(0)

    def gradient(shape: tuple[int, ...]) -> np.ndarray:
        g = rng.standard_normal((steps, *shape)) * 10 ** rng.uniform(-3, 1, shape)
        return (g * (rng.uniform(size=g.shape) > 0.1)).astype(dtype)

    params = {k: rng.uniform(1, 2, s).astype(dtype) for k, s in SHAPES.items()}
    return params, {k: gradient(s) for k, s in SHAPES.items()}


class Run:
    """A transformation on a mesh.

    Args:
      tx: the transformation.
      shape: of the mesh.
      axes: that the parameters are sharded over.
      params: parameters whose shapes and dtypes it trains.
    """

    def __init__(self, tx: Any, shape: tuple[int, int], axes: Any, params: Any):
        mesh = mesh_of(shape)
        self._shardings = {k: NamedSharding(mesh, s) for k, s in specs(axes).items()}
        self._stacks = {
            k: NamedSharding(mesh, PartitionSpec(None, *s.spec))
            for k, s in self._shardings.items()
        }
        placed = {
            k: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=self._shardings[k])
            for k, p in params.items()
        }
        shardings = optax_rms.state_shardings(tx, placed)
        state = jax.eval_shape(tx.init, placed)
        self.template = (
            placed,
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                state,
                shardings,
            ),
        )

        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        def train(params, state, gradients):
            state = tx.init(params) if state is None else state
            return jax.lax.scan(step, (params, state), gradients)[0]

        self._train = jax.jit(train, out_shardings=(self._shardings, shardings))

    def __call__(
        self, params: Any, gradients: Any, state: Any = None
    ) -> tuple[Any, int]:
        """Parameters and state after all gradients, and the number of collectives."""
        params = jax.device_put(params, self._shardings)
        gradients = jax.device_put(gradients, self._stacks)
        program = self._train.lower(params, state, gradients).compile()
        collectives = len(COLLECTIVE.findall(program.as_text()))
        return program(params, state, gradients), collectives


def compare(case: Case, steps: int) -> list[dict[str, Any]]:
    """One run on one device, and a row for each other arrangement."""
    make, dtype = case
    params, gradients = data(steps, dtype)
    alone = Run(make(), (1, 1), (), params)
    expected, _ = alone(params, gradients)
    rows = []
    for name, shape, axes in layouts():
        run = Run(make(), shape, axes, params)
        found, collectives = run(params, gradients)
        row = {"layout": name, "collectives": collectives}
        rows.append(row | differences(found, expected))
    return rows


def differences(found: Any, expected: Any) -> dict[str, Any]:
    """Numbers of elements that are compared, and of those with other bits.

    ``lone`` is the leaf of which a device may have one element. The largest difference
    of its numbers is relative to the number or, below 1, absolute, in units of 2^-23.
    """
    counts = {"compared": 0, "different": 0, "lone_different": 0}
    largest = 0.0
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        width = max(1, a.itemsize)
        differ = np.any(
            np.atleast_1d(a).view(np.uint8).reshape(-1, width)
            != np.atleast_1d(e).view(np.uint8).reshape(-1, width),
            axis=1,
        )
        if a.shape != LONE:
            counts["compared"] += differ.size
            counts["different"] += int(differ.sum())
            continue
        counts["lone_different"] += int(differ.sum())
        if np.any(differ) and a.dtype == np.float32:
            error = np.abs(a.astype(np.float64) - e) / np.maximum(1, np.abs(e))
            largest = max(largest, float(error.max()) * 2**23)
    return counts | {"lone_largest": largest}


def resume(name: str, steps: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Runs that go on from a checkpoint on other devices, beside one on one device."""
    make, dtype = FORMATS[name]
    params, gradients = data(steps, dtype)
    alone = Run(make(), (1, 1), (), params)
    expected, _ = alone(params, gradients)
    rows = []
    for chain, shapes in CHAINS.items():
        carry = params, None
        for i, shape in enumerate(shapes):
            run = Run(make(), shape, ("x", "y"), params)
            part = slice(i * steps // len(shapes), (i + 1) * steps // len(shapes))
            path = folder / f"{name} {chain}".replace(" ", "_")
            if i > 0:
                save(path / str(i), carry)
                carry = restore(path / str(i), run.template)
            before, state = carry
            carry, _ = run(before, {k: g[part] for k, g in gradients.items()}, state)
        rows.append({"chain": chain} | differences(carry, expected))
    path = folder / f"{name} processes".replace(" ", "_")
    first_half_in_two_processes(name, steps, path)
    second = {k: g[steps // 2 :] for k, g in gradients.items()}
    before, state = restore(path, alone.template)
    carry, _ = alone(before, second, state)
    rows.append({"chain": TWO_PROCESSES} | differences(carry, expected))
    return rows


def save(path: pathlib.Path, carry: Any) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, carry)


def restore(path: pathlib.Path, template: Any) -> Any:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, template)


def first_half_in_two_processes(name: str, steps: int, path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.same_bits", "--process"]
    arguments = [address, name, str(steps), str(path)]
    processes = [
        subprocess.Popen([*command, str(i), *arguments], cwd=record.ROOT)
        for i in range(2)
    ]
    if any(process.wait() for process in processes):
        raise RuntimeError(f"a process of {' '.join(command)} failed, see its message.")


def process(number: str, address: str, name: str, steps: str, path: str) -> None:
    """The first half of a run, as one of two processes."""
    jax.config.update("jax_num_cpu_devices", DEVICES // 2)
    jax.distributed.initialize(address, 2, int(number))
    make, dtype = FORMATS[name]
    params, gradients = data(int(steps), dtype)
    run = Run(make(), (4, 2), ("x", "y"), params)
    first = {k: g[: int(steps) // 2] for k, g in gradients.items()}
    carry, _ = run(params, first)
    save(pathlib.Path(path), carry)


def measure(quick: bool, progress: Callable[..., Any] = tqdm) -> dict[str, Any]:
    steps, chosen, resumed = STEPS, cases(), list(RESUMED)
    if quick:
        steps, resumed = 20, resumed[:1]
        chosen = {name: chosen[name] for name in ("plain", RESUMED[0])}
    rows = [
        {"row": name, "layouts": compare(case, steps)}
        for name, case in progress(chosen.items(), desc="layouts", unit="row")
    ]
    with tempfile.TemporaryDirectory() as folder:
        chains = [
            {"row": name, "chains": resume(name, steps, pathlib.Path(folder))}
            for name in progress(resumed, desc="checkpoints", unit="row")
        ]
    return {"steps": steps, "rows": rows, "resumed": chains}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps and rows")
    parser.add_argument("--process", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    if options.process:
        process(*options.process)
        return
    jax.config.update("jax_num_cpu_devices", DEVICES)
    folder = record.RESULTS
    if options.quick:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="benchmarks-"))
    print(record.save("same_bits", measure(options.quick), folder))


if __name__ == "__main__":
    main()
