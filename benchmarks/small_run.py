# SPDX-License-Identifier: Apache-2.0
"""A small training run with a compressed state and checkpoints, as the examples save.

The run is deterministic: interrupted and resumed, it must end with the same bits.
"""

import os
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_rms
from examples.common import command_line, processes, results, resumable

STEPS = 20  # of an epoch
SETTINGS = {"optimizer": "rmsprop", "nu": "UE6M2", "trace": "SE5M2"}


def optimizer() -> Any:
    inner = optax_rms.rmsprop(1e-3, momentum=0.9)
    return optax_rms.compress_state(inner, nu=optax_rms.UE6M2, trace=optax_rms.SE5M2)


def create(tx: Any, width: int = 64) -> TrainState:
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (width, width)), "b": jnp.zeros(width)}
    return TrainState.create(apply_fn=apply, params=params, tx=tx)


def apply(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"])


def messages_of(folder: Path) -> Path:
    """The file beside a folder that receives the messages of its run."""
    return folder.with_name(f"{folder.name}.txt")


def run(
    folder: Path,
    num_epochs: int,
    num_processes: int = 1,
    file_size_limit: int | None = None,
) -> None:
    """Resumes or starts the run in a folder, and writes the hash of its last bits."""
    folder.mkdir(parents=True, exist_ok=True)
    with messages_of(folder).open("w") as messages:
        os.dup2(messages.fileno(), sys.stdout.fileno())
        os.dup2(messages.fileno(), sys.stderr.fileno())
    if file_size_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (file_size_limit,))
    try:
        processes.run_together(partial(_train, folder, num_epochs), num_processes)
    except (command_line.InputError, OSError) as error:
        sys.exit(f"ended: {error}")


def _train(folder: Path, num_epochs: int) -> None:
    mesh = Mesh(np.array(jax.devices()), "data")
    replicated = NamedSharding(mesh, PartitionSpec())
    tx = optimizer()
    params = jax.eval_shape(partial(create, tx)).params
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=replicated), params
    )
    shardings = jax.eval_shape(partial(create, tx)).replace(
        step=replicated,
        params=jax.tree.map(lambda _: replicated, params),
        opt_state=optax_rms.state_shardings(tx, params, over="data"),
    )

    @partial(jax.jit, out_shardings=(shardings, replicated))
    def epoch(state: TrainState) -> Any:
        def step(state: TrainState, _: None) -> Any:
            key = jax.random.fold_in(jax.random.key(1), state.step)
            x = jax.random.normal(key, (8, state.params["b"].size))

            def loss(params: Any) -> jax.Array:
                return jnp.mean(jnp.square(apply(params, x) - jnp.sin(x)))

            value, gradients = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=gradients), value

        state, losses = jax.lax.scan(step, state, length=STEPS)
        return state, {"loss": losses.mean()}

    state = jax.jit(partial(create, tx), out_shardings=shardings)()
    state, _ = resumable.train(epoch, state, num_epochs, folder, SETTINGS, resume=True)
    gather = jax.jit(lambda state: state, out_shardings=replicated)
    whole = jax.tree.map(np.asarray, gather(state))
    if jax.process_index() == 0:
        bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
        found = {"sha256": results.sha256(whole), "bits": bits}
        results.write_json(found, folder / "end.json")
