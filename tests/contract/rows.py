# SPDX-License-Identifier: Apache-2.0
"""The public transformations, in their main variants, that the contract is for."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
import pytest

from optax_rms import rmsprop, scale_by_rms


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A transformation, and what of the contract it is known not to keep.

    Attributes:
      build: makes the transformation from the following, as named arguments.
      numbers: arguments that may be traced; the first changes the trajectory.
      options: arguments that are fixed when the transformation is built.
      exceptions: for the name of a check without ``test_``, why it cannot pass.
      eps: the name of the argument that keeps the denominator from 0.
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

ROWS = [
    Row("scale_by_rms", scale_by_rms, {"decay": 0.8, "eps": 1e-4}),
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
        {"grad_is_finite_difference": "the rounding of the state is a staircase"},
    ),
]


def every_row(check):
    """Parametrize a check by all rows; one that a row excepts must fail."""
    name = check.__name__.removeprefix("test_")
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(
                row,
                id=row.name,
                marks=[pytest.mark.xfail(reason=row.exceptions[name], strict=True)]
                if name in row.exceptions
                else [],
            )
            for row in ROWS
        ],
    )(check)
