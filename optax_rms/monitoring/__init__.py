# SPDX-License-Identifier: Apache-2.0
"""Numbers about the steps of any Optax optimizer."""

from optax_rms.monitoring._count_extremes import CodeCounts, count_extremes
from optax_rms.monitoring._figures import Figures
from optax_rms.monitoring._monitor import MonitorState, monitor, read_report
from optax_rms.monitoring._step_report import StepReport, step_report

__all__ = [
    "CodeCounts",
    "Figures",
    "MonitorState",
    "StepReport",
    "count_extremes",
    "monitor",
    "read_report",
    "step_report",
]
