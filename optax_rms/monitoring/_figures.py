# SPDX-License-Identifier: Apache-2.0
"""The figures of a report as Python numbers."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Figures(NamedTuple):
    """What one step did to a leaf, to a layer of a leaf, or to all leaves together.

    Shares lie between 0 and 1. A figure is ``None`` where the state, ``eps`` or
    ``decay`` does not tell it, and where its denominator is 0.

    Attributes:
      elements: number of elements.
      gradient_rms: root mean square of the gradient.
      update_rms: root mean square of the update.
      parameter_rms: root mean square of the parameter before the step.
      update_to_parameter: ``update_rms / parameter_rms``.
      rate_p01: effective learning rate ``|update| / |gradient|``, the 1st percentile
        over the elements whose gradient is not 0, to 6 %.
      rate_p50: its median.
      rate_p99: its 99th percentile.
      ruled_by_eps: share of elements whose mean square is below ``eps``, or whose root
        mean square is, if ``eps`` is outside the root. Of a centered state the variance
        is taken in place of the mean square. Elements that have not had a gradient yet
        are left out.
      lost_to_rounding: share of the updates other than 0 that do not move the
        parameter, because the sum rounds to the same number of its dtype.
      at_cap: share of elements whose step is at the bound ``1 / sqrt(1 - decay)``, or
        within 14 % of it: at least 3/4 of the mean square is this gradient's.
      gradient_to_mean_square: mean of the squared gradient over the mean of the mean
        squares; about 1, and more in a spike, up to ``1 / (1 - decay)``.
      noise_to_signal: of a centered state, root of the mean variance over the root mean
        square of the mean gradient.
      zero_gradients: share of gradients of 0.
      zero_updates: share of updates of 0.
      nonfinite: share of elements whose gradient, update or parameter is not finite.
      saturated_codes: share of codes at the largest value of their format.
      state_bytes: bytes of the state; of all leaves together with its counters.
    """

    elements: int
    gradient_rms: float | None
    update_rms: float | None
    parameter_rms: float | None
    update_to_parameter: float | None
    rate_p01: float | None
    rate_p50: float | None
    rate_p99: float | None
    ruled_by_eps: float | None
    lost_to_rounding: float | None
    at_cap: float | None
    gradient_to_mean_square: float | None
    noise_to_signal: float | None
    zero_gradients: float | None
    zero_updates: float | None
    nonfinite: float | None
    saturated_codes: float | None
    state_bytes: int | None


def combine(
    rows: Mapping[str, np.ndarray], rates: np.ndarray, state_bytes: float | None
) -> Figures:
    """The figures of rows of a report together, from its arrays by their names."""
    elements = rows["elements"].astype(np.float64)
    everywhere = np.ones_like(elements, bool)

    def root_mean_square(name: str, where: np.ndarray = everywhere) -> float | None:
        weights, column = elements[where], rows[name][where].astype(np.float64)
        return _sqrt(_ratio(np.sum(weights * column**2), np.sum(weights)))

    def count(name: str) -> float | None:
        return float(rows[name].sum(dtype=np.float64)) if name in rows else None

    told = rows["second_moment"] != 0
    second_moment = root_mean_square("second_moment", told)
    own = root_mean_square("gradient_rms", told)
    update, parameter = map(root_mean_square, ("update_rms", "parameter_rms"))
    total = float(elements.sum())
    low, middle, high = (None if np.isnan(rate) else float(rate) for rate in rates)
    updates = total - (count("zero_updates") or 0)
    spike = _ratio(own, second_moment)
    return Figures(
        elements=int(total),
        gradient_rms=root_mean_square("gradient_rms"),
        update_rms=update,
        parameter_rms=parameter,
        update_to_parameter=_ratio(update, parameter),
        rate_p01=low,
        rate_p50=middle,
        rate_p99=high,
        ruled_by_eps=_ratio(count("ruled_by_eps"), count("live")),
        lost_to_rounding=_ratio(count("lost_to_rounding"), updates),
        at_cap=_ratio(count("at_cap"), count("live")),
        gradient_to_mean_square=None if spike is None else spike**2,
        noise_to_signal=_ratio(root_mean_square("deviation"), root_mean_square("mean")),
        zero_gradients=_ratio(count("zero_gradients"), total),
        zero_updates=_ratio(count("zero_updates"), total),
        nonfinite=_ratio(count("nonfinite"), total),
        saturated_codes=_ratio(count("saturated"), count("codes")),
        state_bytes=None if state_bytes is None else round(state_bytes),
    )


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or not denominator:
        return None
    return float(numerator) / float(denominator)


def _sqrt(x: float | None) -> float | None:
    return None if x is None else float(np.sqrt(x))
