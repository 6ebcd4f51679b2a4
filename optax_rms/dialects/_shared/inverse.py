# SPDX-License-Identifier: Apache-2.0
"""The exact inverse of a rounded function."""

from collections.abc import Callable

import numpy as np


def exact_inverse(
    function: Callable[[np.ndarray], np.ndarray], guess: np.ndarray, value: np.ndarray
) -> np.ndarray:
    """Return an array that ``function`` maps to ``value`` bit for bit, if it has one.

    The original of a value that ``function`` has rounded lies within half a step of the
    inverse in exact arithmetic. So the original is the rounded inverse or one of the
    two numbers next to it, for example 1.0000001 or 0.99999994 beside 1.0 in float32.

    Args:
      function: an elementwise function, of one argument.
      guess: the inverse at ``value``, rounded to the dtype of the original.
      value: the result of ``function``.

    Returns:
      ``guess``, with an element replaced by the next smaller or the next larger number
      where ``function`` maps that number to the element of ``value``, and ``guess``
      not.
    """
    infinity = np.asarray(np.inf, guess.dtype)
    candidates = [
        guess,
        np.nextafter(guess, -infinity),
        np.nextafter(guess, infinity),
    ]
    is_exact = [function(candidate) == value for candidate in candidates]
    return np.select(is_exact, candidates, guess)
