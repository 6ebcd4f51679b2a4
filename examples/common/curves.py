# SPDX-License-Identifier: Apache-2.0
"""The picture of a training run: loss and accuracy, epoch by epoch."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw(history: list[dict[str, float]], path: Path) -> None:
    """Draws the metrics of each epoch, of training and validation."""
    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for label, key in (("training", metric), ("validation", f"val_{metric}")):
            values = [metrics[key] for metrics in history]
            axes.plot(epochs, values, marker=".", label=f"{label}: {values[-1]:.3f}")
        axes.set(xlabel="epoch", title=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
