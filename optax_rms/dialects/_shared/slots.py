# SPDX-License-Identifier: Apache-2.0
"""A framework's slots of a parameter, and the fields of `optax_rms.rmsprop`.

A framework is described by a mapping from its names of the slots to the fields ``nu``,
``mu`` and ``trace``, for example ``{"velocity": "nu", "average_gradient": "mu",
"momentum": "trace"}``. Two of the three numbers differ:

* Centered, frameworks keep the mean square, and this library the ``variance``, which is
  the mean square less the squared mean.
* Where the learning rate is inside the momentum, frameworks subtract the momentum from
  the parameters. Optax and this library add the momentum, with the opposite sign.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_rms.dialects._shared import variances


def to_fields(
    slots: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    *,
    negate_momentum: bool = True,
) -> dict[str, np.ndarray]:
    """Turn the slots of a parameter into fields, ``variance`` in place of ``nu``.

    Args:
      slots: arrays by the framework's names. A slot without a field in ``names``, for
        example a sum of gradients, keeps name and numbers.
      names: the field of each slot.
      negate_momentum: whether the framework subtracts its momentum.
    """
    fields = {names.get(slot, slot): array for slot, array in slots.items()}
    if "mu" in fields:
        fields["variance"] = variances.variance(fields.pop("nu"), fields["mu"])
    if "trace" in fields and negate_momentum:
        fields["trace"] = -fields["trace"]
    return fields


def to_slots(
    fields: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    dtype: Any,
    *,
    negate_momentum: bool = True,
) -> dict[str, np.ndarray]:
    """The inverse of `to_fields`, in the framework's ``dtype``.

    The mean is rounded to ``dtype`` before the mean square is formed, because the
    framework, and `to_fields`, subtract the square of the rounded mean.
    """
    with np.errstate(over="ignore"):
        arrays = {field: array.astype(dtype) for field, array in fields.items()}
    if "variance" in fields:
        del arrays["variance"]
        arrays["nu"] = variances.mean_square(fields["variance"], arrays["mu"])
    if "trace" in fields and negate_momentum:
        arrays["trace"] = -arrays["trace"]
    return {slot_of(field, names): array for field, array in arrays.items()}


def slot_of(field: str, names: Mapping[str, str]) -> str:
    """The framework's name of a field."""
    of_fields = {own: slot for slot, own in names.items()}
    return of_fields.get("nu" if field == "variance" else field, field)
