# SPDX-License-Identifier: Apache-2.0
"""The rows of the contract: every public transformation, in its main variants.

A new transformation needs one row here, and passes every check of tests/contract or
says why not.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_rms import (
    UE6M2,
    compress_state,
    dialects,
    monitor,
    one_pass,
    recipes,
    rmsprop,
    scale_by_rms,
    shard_state,
    split_master_weights,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A transformation, and the checks of the contract that it cannot pass.

    Attributes:
      name: of the row, in the names of its tests.
      build: makes the transformation from ``numbers`` and ``options``, passed by name.
      numbers: arguments that may be traced; the first changes the trajectory.
      options: arguments that are fixed when the transformation is built.
      exceptions: the reason for each check that must fail, by the name of the check
        without ``test_``: for example, ``{"masked": "sums over all leaves"}``.
      eps: name of the argument that keeps the denominator from 0.
    """

    name: str
    build: Callable[..., optax.GradientTransformation]
    numbers: Mapping[str, float]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eps: str = "eps"

    def __call__(self, **changes) -> optax.GradientTransformation:
        return self.build(**{**self.numbers, **self.options, **changes})


def _halving(count):
    return 0.1 * jnp.where(count < 2, 1.0, 0.5)


_RATE = {"learning_rate": 0.1, "decay": 0.8, "eps": 1e-4}
_MOMENTUM = {**_RATE, "momentum": 0.9}

_STAIRCASE = "the rounding of the state is a staircase"


_SHRINKS = "weight decay shrinks the point that schedule_free interpolates"
_MASKED_IN_NNX = (
    {"flax_nnx_optimizer": "Flax 0.11 cannot hold any optax.MaskedNode"}
    if flax.__version__.startswith("0.11.")
    else {}
)
_PLACE = "how an element is rounded depends on the place of its leaf in the tree"


def _compressed(learning_rate, decay, eps, momentum):
    inner = rmsprop(learning_rate, decay, eps, momentum=momentum)
    return compress_state(inner, nu=UE6M2)


def _split(learning_rate, decay, eps):
    return split_master_weights(rmsprop(learning_rate, decay, eps))


def _monitored(learning_rate, decay, eps):
    inner = rmsprop(learning_rate, decay, eps)
    return monitor(inner, every=2, eps=eps, decay=decay)


def _in_one_pass(learning_rate, decay, eps, momentum):
    return one_pass(rmsprop(learning_rate, decay, eps, momentum=momentum))


def _sharded(learning_rate, decay, eps):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    return shard_state(rmsprop(learning_rate, decay, eps), mesh, "data")


ROWS = [
    Row(
        "scale_by_rms",
        scale_by_rms,
        {"decay": 0.8, "eps": 1e-4},
        exceptions={"extra_arguments": "optax.scale_by_rms has none either"},
    ),
    Row("plain", rmsprop, _RATE),
    Row("eps_outside", rmsprop, _RATE, {"eps_in_sqrt": False}),
    Row("centered", rmsprop, _RATE, {"centered": True}),
    Row("momentum", rmsprop, _MOMENTUM),
    Row("nesterov", rmsprop, _MOMENTUM, {"nesterov": True}),
    Row("bias_correction", rmsprop, _RATE, {"bias_correction": True}),
    Row(
        "centered_momentum_bias_correction",
        rmsprop,
        {**_MOMENTUM, "initial_scale": 0.5},
        {"centered": True, "bias_correction": True},
    ),
    Row("schedule", rmsprop, {"decay": 0.8}, {"learning_rate": _halving}),
    Row("lr_outside_momentum", rmsprop, _MOMENTUM, {"lr_in_momentum": False}),
    Row(
        "bfloat16_accumulator",
        rmsprop,
        _MOMENTUM,
        {"accumulator_dtype": "bfloat16"},
        {"grad_is_finite_difference": _STAIRCASE},
    ),
    Row(
        "torch",
        dialects.torch.rmsprop,
        {"lr": 0.1, "alpha": 0.8, "eps": 1e-4, "weight_decay": 0.1, "momentum": 0.9},
        exceptions={"schedule_free": _SHRINKS},
    ),
    Row(
        "timm",
        dialects.torch.rmsprop_tf,
        {"lr": 0.1, "alpha": 0.8, "eps": 1e-4, "weight_decay": 0.1, "momentum": 0.9},
        {"decoupled_decay": True, "caution": True},
        {
            "schedule_free": _SHRINKS,
            "flatten": "caution counts the signs of each leaf by itself",
            "inside_of_shards": "caution counts the signs of each shard by itself",
        },
    ),
    Row(
        "stable_baselines3",
        dialects.torch.rmsprop_tf_like,
        {"lr": 0.1, "alpha": 0.8, "eps": 1e-4, "weight_decay": 0.1, "momentum": 0.9},
        exceptions={"schedule_free": _SHRINKS},
    ),
    Row(
        "pfrl",
        dialects.torch.rmsprop_eps_inside_sqrt,
        {"lr": 0.1, "alpha": 0.8, "eps": 1e-4, "weight_decay": 0.1, "momentum": 0.9},
        exceptions={"schedule_free": _SHRINKS},
    ),
    Row(
        "keras",
        dialects.keras.rmsprop,
        {"learning_rate": 0.1, "rho": 0.8, "momentum": 0.9, "epsilon": 1e-4},
        {"weight_decay": 0.1, "clipvalue": 0.4},
        {"schedule_free": _SHRINKS},
        eps="epsilon",
    ),
    Row(
        "tensorflow",
        dialects.tensorflow.rmsprop,
        {"learning_rate": 0.1, "decay": 0.8, "momentum": 0.9, "epsilon": 1e-4},
        eps="epsilon",
    ),
    Row(
        "legacy_keras",
        dialects.tensorflow.legacy_keras_rmsprop,
        {
            "learning_rate": 0.1,
            "rho": 0.8,
            "momentum": 0.9,
            "epsilon": 1e-4,
            "decay": 0.5,
        },
        eps="epsilon",
    ),
    Row(
        "laprop",
        recipes.laprop,
        {"learning_rate": 0.1, "b2": 0.8, "b1": 0.9, "eps": 1e-4},
    ),
    Row(
        "compressed",
        _compressed,
        _MOMENTUM,
        exceptions={
            "grad_is_finite_difference": _STAIRCASE,
            "masked": _PLACE,
            "partition": _PLACE,
            "flatten": _PLACE,
            "inside_of_shards": "how an element is rounded depends on its place, there "
            "in the shard",
        },
    ),
    # These parameters are float32 and stay whole; those of test_master_weights are not.
    Row(
        "master_weights",
        _split,
        _RATE,
        exceptions={"tree_map_params": "what stays whole has optax.MaskedNode there"}
        | _MASKED_IN_NNX,
    ),
    # The tests of `one_pass` repeat this row in a process with the flag of XLA.
    Row("one_pass", _in_one_pass, _MOMENTUM),
    Row(
        "monitor",
        _monitored,
        _RATE,
        exceptions={
            "types_on_an_explicit_mesh": "the sample of a report is drawn by indices",
            "inside_of_shards": "before the first step a report is the same everywhere",
        },
    ),
    Row(
        "shard_state",
        _sharded,
        _RATE,
        exceptions=dict.fromkeys(
            (
                "jit_of_init_lies_where_the_parameters_lie",
                "sharded_over_eight_devices",
                "types_on_an_explicit_mesh",
                "inside_of_shards",
                "every_transformation",
                "a_split_state_gives_the_bits_of_a_whole_one",
            ),
            "its state lies where it was told to",
        ),
    ),
]


# The rows that run by default. The others differ from them in single steps.
QUICK = {
    "centered_momentum_bias_correction",
    "compressed",
    "master_weights",
    "schedule",
    "torch",
}


def every_row(check):
    """Parametrize a check by all rows; a row with an exception for it must fail."""
    name = check.__name__.removeprefix("test_")

    def marks(row):
        if row.name not in QUICK:
            yield pytest.mark.slow
        if name in row.exceptions:
            yield pytest.mark.xfail(reason=row.exceptions[name], strict=True)

    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=row.name, marks=[*marks(row)]) for row in ROWS]
    )(check)
