# SPDX-License-Identifier: Apache-2.0
"""The variance of centered RMSProp here, and the mean square of other frameworks."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_rms.dialects._shared.inverse import exact_inverse


def is_less_than_square(
    mean_square: np.ndarray, mean: np.ndarray, dtype: Any = np.float32
) -> bool:
    """Whether a mean square is less than the squared mean by more than by rounding.

    A square that underflows in the ``dtype`` of the framework is lost in every step,
    and missing from an average 1 / (1 - decay) times: up to 10^4, for decays in use.
    """
    lost = 1e4 * float(jnp.finfo(dtype).tiny)
    wide = np.abs(mean).astype(np.float64)
    return bool(np.any(mean_square + lost < 0.5 * np.square(wide)))


def variance(mean_square: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The mean square less the squared mean, or 0 where the difference is negative.

    Rounding makes the mean square of some frameworks smaller than the squared mean.
    Real and imaginary parts of complex arrays are treated as arrays of their own.
    """
    if np.iscomplexobj(mean_square):
        return _by_parts(variance, mean_square, mean)
    wide = mean_square.astype(np.float64) - np.square(mean.astype(np.float64))
    dtype = np.promote_types(mean_square.dtype, np.float32)
    return np.maximum(wide, 0).astype(dtype)


def mean_square(
    variance_: np.ndarray, mean: np.ndarray, dtype: Any = None
) -> np.ndarray:
    """The inverse of `variance`, in ``dtype`` or that of ``mean``.

    Of a mean square much larger than the variance, only the leading digits of the
    variance remain, in every framework that stores the mean square. But a variance that
    came from such a mean square comes from the result as well, bit for bit.
    """
    dtype = dtype or mean.dtype
    if np.iscomplexobj(variance_):
        return _by_parts(mean_square, variance_, mean)
    wide = variance_.astype(np.float64) + np.square(mean.astype(np.float64))
    with np.errstate(over="ignore"):
        nearest = wide.astype(dtype)
    return exact_inverse(lambda squares: variance(squares, mean), nearest, variance_)


def _by_parts(function: Callable[..., np.ndarray], *arrays: Any) -> np.ndarray:
    result: Any = np.empty_like(arrays[0])
    result.real = function(*(x.real for x in arrays))
    result.imag = function(*(x.imag for x in arrays))
    return result
