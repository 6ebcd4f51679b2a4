# SPDX-License-Identifier: Apache-2.0
"""Bytes and kernels of a step, as XLA compiles it for an H100 and for a TPU v5e.

    pip install libtpu jax-cuda12-pjrt jax-cuda12-plugin nvidia-cuda-nvcc-cu12
    python -m benchmarks.compiled

The compilers need no such device, only these packages, in the versions of the installed
jax. No step runs: the programs show the bytes that a step moves and the kernels that it
launches, but not how long it takes.
"""

import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from benchmarks import memory, peers, record
from benchmarks.leaves import LEAF_SETS, Shapes
from benchmarks.peers import TRANSFORMATIONS

# Figures from OpenXLA, 2026, xla/backends/gpu/target_config/specs/h100_sxm.txtpb,
# https://github.com/openxla/xla
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
DEVICES: dict[str, Callable[[], Any]] = {
    "H100": functools.partial(
        topologies.get_topology_desc,
        platform="cuda",
        topology="1x1x4",
        target_config=H100,
    ),
    "TPU v5e": functools.partial(
        topologies.get_topology_desc, platform="tpu", topology_name="v5e:2x2"
    ),
}
CASES = [case for case in memory.CASES if case[0] in TRANSFORMATIONS]
MANY_LEAVES = "GPT-2 124M"

ARRAY = re.compile(r"(?:pred|[a-z]+(\d+))\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%\S+) = (.*?) ([a-z][a-z-]*)\((.*?)\)", re.M)
COLLECTIVE = re.compile(r" (?:all-|collective-|reduce-scatter)[a-z-]*(?<!-done)\(")
# These operations name memory, or wait for another operation that moves bytes.
FREE = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}
FREE |= {"copy-done", "slice-done"}


def measure(progress: Callable[..., Any] = tqdm) -> dict[str, Any]:
    one_leaf = LEAF_SETS["one leaf of 16M"]
    elements = math.prod(*one_leaf)
    rows = []
    for name, topology in DEVICES.items():
        devices = topology().devices
        one, four = (
            Mesh(np.reshape(devices[: n * n], (n, n)), ("rows", "columns"))
            for n in (1, 2)
        )
        for side, dtype in progress(CASES, desc=name, unit="optimizer"):
            program = compile_step(side, one_leaf, dtype, one)
            needs = program.memory_analysis()
            sharded = compile_step(side, one_leaf, dtype, four)
            limit = needs.argument_size_in_bytes + needs.output_size_in_bytes
            row = {
                "device": name,
                "side": side,
                "dtype": dtype,
                "limit": limit / elements,
                "moved": moved_bytes(program.as_text()) / elements,
                "temporary": needs.temp_size_in_bytes / elements,
                "collectives": len(COLLECTIVE.findall(sharded.as_text())),
            }
            if name == "H100":
                many = compile_step(side, LEAF_SETS[MANY_LEAVES], dtype, one)
                row["kernels"] = len(launches(many.as_text()))
            rows.append(row)
    return {"leaves": len(LEAF_SETS[MANY_LEAVES]), "rows": rows}


def compile_step(side: str, shapes: Shapes, dtype: str, mesh: Mesh) -> Any:
    """The step that every user writes, for devices that may be absent.

    Matrices are in shards along both axes, all else is replicated.
    """
    tx = TRANSFORMATIONS[side]()

    def placed(x):
        spec = PartitionSpec(*mesh.axis_names if x.ndim == 2 else ())
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = [placed(jax.ShapeDtypeStruct(shape, dtype)) for shape in shapes]
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))
    step = jax.jit(peers.jax_step(tx), donate_argnums=(0, 1))
    return step.lower(params, state, params).compile()


def moved_bytes(program: str) -> int:
    """Bytes that the instructions of a compiled program read from and write to memory.

    Vector memory, which XLA marks ``S(1)``, is part of a TPU's core and does not count.
    """
    types = {name: type for name, type, _, _ in instructions(program)}
    total = 0
    for _, type, operation, operands in launches(program):
        if operation == "slice-start":
            # Of the types of source, destination and semaphore, the destination: a
            # slice of the source, in vector memory.
            _, slice, _ = ARRAY.findall(type)
            total += array_bytes(*slice[:2])
            continue
        total += bytes_in_memory(type)
        # The type of a copy-start already holds both source and destination.
        if operation != "copy-start":
            read = dict.fromkeys(re.findall(r"%[^\s,]+", operands))
            total += sum(bytes_in_memory(types[name]) for name in read)
    return total


def launches(program: str) -> list[tuple[str, ...]]:
    return [row for row in instructions(program) if row[2] not in FREE]


def instructions(program: str) -> list[tuple[str, ...]]:
    """Name, type, operation and operands of each instruction in a program's entry."""
    entry = program[program.index("\nENTRY ") :]
    return INSTRUCTION.findall(re.sub(r"/\*.*?\*/", "", entry))


def bytes_in_memory(type: str) -> int:
    """Size of the arrays of a type, for example ``(f32[8,4]{1,0}, u8[8,4]{1,0})``."""
    return sum(
        array_bytes(bits, shape)
        for bits, shape, layout in ARRAY.findall(type)
        if "S(" not in layout
    )


def array_bytes(bits: str, shape: str) -> int:
    size = math.prod(map(int, filter(None, shape.split(","))))
    return int(bits or 8) * size // 8


def main() -> None:
    # Without these settings JAX looks for the devices, which do not exist.
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TPU_SKIP_MDS_QUERY": "1"}
    jax.config.update("jax_platforms", "cpu")
    print(record.save("compiled", measure()))


if __name__ == "__main__":
    main()
