# SPDX-License-Identifier: Apache-2.0
"""The step of a model of 7 billion parameters, as XLA compiles it for 256 TPU chips.

    pip install libtpu
    python -m benchmarks.pod

As in `benchmarks.compiled`, nothing runs, and no such device is needed. Parameters,
gradients and state are fully sharded: matrices along both axes of a mesh of 16 by 16,
vectors along both axes together.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from benchmarks import compiled, peers, record
from benchmarks.leaves import Shapes, llama
from benchmarks.peers import TRANSFORMATIONS

TOPOLOGY = "v5e:16x16"
CASES = [
    (peers.OURS, "float32"),
    (peers.UE6M2, "float32"),
    (peers.SPLIT, "bfloat16"),
]


def measure(progress: Callable[..., Any] = tqdm) -> dict[str, Any]:
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGY
    ).devices
    edge = math.isqrt(len(devices))
    mesh = Mesh(np.reshape(devices, (edge, edge)), ("rows", "columns"))
    shapes = llama()
    rows = [
        {"side": side, "dtype": dtype} | needs_of_step(side, shapes, dtype, mesh)
        for side, dtype in progress(CASES, unit="optimizer")
    ]
    return {
        "topology": TOPOLOGY,
        "chips": len(devices),
        "leaves": len(shapes),
        "parameters": sum(map(math.prod, shapes)),
        "rows": rows,
    }


def needs_of_step(side: str, shapes: Shapes, dtype: str, mesh: Mesh) -> dict[str, int]:
    """Bytes on each chip, and the collectives of the program.

    The floor is the bytes that one chip has to read and write: an equal share of the
    gradients, once, and of parameters and state, twice. Step counts, of a few bytes,
    lie on every chip.
    """
    tx = TRANSFORMATIONS[side]()

    def placed(x: Any) -> Any:
        axes = mesh.axis_names
        spec = PartitionSpec(*(axes if x.ndim == 2 else (axes,) if x.ndim else ()))
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = [placed(jax.ShapeDtypeStruct(shape, dtype)) for shape in shapes]
    state = jax.tree.map(placed, jax.eval_shape(tx.init, params))
    step = jax.jit(peers.jax_step(tx), donate_argnums=(0, 1))
    program = step.lower(params, state, params).compile()
    text, memory = program.as_text(), program.memory_analysis()
    return {
        "state": share(state),
        "floor": share(params) + 2 * share((params, state)),
        "moved": compiled.moved_bytes(text),
        "resident": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "collectives": len(compiled.COLLECTIVE.findall(text)),
    }


def share(tree: Any) -> int:
    """Bytes of the shards that one device has of all arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def main() -> None:
    # Without this setting JAX looks for the devices, which do not exist.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    jax.config.update("jax_platforms", "cpu")
    print(record.save("pod", measure()))


if __name__ == "__main__":
    main()
