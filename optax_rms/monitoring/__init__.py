# SPDX-License-Identifier: Apache-2.0
"""What a step of any Optax optimizer did, in numbers."""

from optax_rms.monitoring._count_extremes import CodeCounts, count_extremes

__all__ = [
    "CodeCounts",
    "count_extremes",
]
