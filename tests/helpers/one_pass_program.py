# SPDX-License-Identifier: Apache-2.0
"""Compiles and runs steps with `one_pass`, and prints the findings as JSON.

The arguments are names of `CASES`. The tests run this program in a separate process,
whose ``XLA_FLAGS`` has the flag.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_rms import (
    SE5M2,
    UE6M2,
    UE8M8,
    compress_state,
    dialects,
    one_pass,
    rmsprop,
    split_master_weights,
)

FLAG = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
STEPS = 4
SHAPE = (512, 512)
# Decided before the code of the processor is generated.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Case(NamedTuple):
    """An optimizer, and the bytes per parameter that a step may move.

    Attributes:
      make: makes the optimizer.
      most_bytes: gradients are read, parameters and state read and written. For states
        of one or two bytes, whose codes have loops of their own, what was measured:
        without the flag and without `one_pass` these steps move 21, 26, 46 and 40.
      dtype: of the parameters.
    """

    make: Callable[[], optax.GradientTransformation]
    most_bytes: int
    dtype: str = "float32"


_rmsprop = functools.partial(rmsprop, 1e-3)
_momentum = functools.partial(_rmsprop, momentum=0.9)


def _compressed(**formats):
    return compress_state(_momentum() if "trace" in formats else _rmsprop(), **formats)


FLOAT32 = {
    "plain": Case(_rmsprop, 20),
    "momentum": Case(_momentum, 28),
    "nesterov": Case(functools.partial(_momentum, nesterov=True), 28),
    "lr_outside_momentum": Case(functools.partial(_momentum, lr_in_momentum=False), 28),
    "centered": Case(functools.partial(_rmsprop, centered=True), 28),
    "centered_momentum": Case(functools.partial(_momentum, centered=True), 36),
    "torch": Case(lambda: dialects.torch.rmsprop(1e-3, momentum=0.9), 28),
    "keras": Case(lambda: dialects.keras.rmsprop(1e-3, momentum=0.9), 28),
    "tensorflow": Case(lambda: dialects.tensorflow.rmsprop(1e-3, momentum=0.9), 28),
    "optax.rmsprop": Case(lambda: optax.rmsprop(1e-3), 20),
    "optax.adam": Case(lambda: optax.adam(1e-3), 28),
    "optax.lion": Case(lambda: optax.lion(1e-3), 20),
    "optax.sgd": Case(lambda: optax.sgd(1e-3, momentum=0.9), 20),
}
NARROW = {
    "UE6M2": Case(lambda: _compressed(nu=UE6M2), 21),
    "UE8M8": Case(lambda: _compressed(nu=UE8M8), 26),
    "UE6M2, momentum": Case(lambda: _compressed(nu=UE6M2, trace=SE5M2), 31),
    "split": Case(lambda: split_master_weights(_compressed(nu=UE6M2)), 27, "bfloat16"),
}
CASES = FLOAT32 | NARROW


def step_of(tx):
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def cost(case: Case) -> dict[str, float]:
    """Bytes per parameter of the compiled step, and its largest temporary array."""
    params = jax.ShapeDtypeStruct(SHAPE, case.dtype)
    tx = one_pass(case.make())
    lowered = step_of(tx).lower(params, jax.eval_shape(tx.init, params), params)
    compiled: Any = lowered.compile(compiler_options=QUICK)
    elements = np.prod(SHAPE)
    return {
        "moved": compiled.cost_analysis()["bytes accessed"] / elements,
        "temporary": compiled.memory_analysis().temp_size_in_bytes / elements,
    }


def last_bits(tx, dtype: str) -> list[bytes]:
    """Parameters and state after some steps, from values at all ends of float32."""
    rng = np.random.default_rng(0)
    ends = [0.0, -0.0, 1e-45, 1e-39, 1e-20, 1e30, np.inf, np.nan]
    magnitudes = np.append(ends, np.geomspace(1e-8, 1e8, 56)).astype(np.float32)
    params: Any = {"kernel": jnp.ones((8, 8), dtype), "bias": jnp.ones(64, dtype)}
    state, step = tx.init(params), step_of(tx)
    for _ in range(STEPS):
        gradients = {
            name: jnp.asarray(rng.permutation(magnitudes).reshape(p.shape), dtype)
            for name, p in params.items()
        }
        params, state = step(params, state, gradients)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((params, state))]


def calls_of_inner() -> list[int]:
    """How often a step calls ``inner.update``, when traced and when not."""
    adam, calls = optax.adam(1e-3), []

    def update(*arguments):
        calls.append(None)
        return adam.update(*arguments)

    tx, params = one_pass(optax.GradientTransformation(adam.init, update)), jnp.ones(3)
    counts = []
    for run in (jax.jit(tx.update), tx.update):
        calls.clear()
        run(params, tx.init(params), params)
        counts.append(len(calls))
    return counts


def main(names: list[str]) -> None:
    found: dict[str, Any] = {"calls": calls_of_inner()}
    for name in names:
        case = CASES[name]
        inner = last_bits(case.make(), case.dtype)
        same = last_bits(one_pass(case.make()), case.dtype) == inner
        found[name] = cost(case) | {"same_bits": same}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
