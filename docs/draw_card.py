# SPDX-License-Identifier: Apache-2.0
"""Draws the picture that a link to the site is shown with.

    python docs/draw_card.py [FOLDER]

The curves are steps of this library: constant gradients, 20 steps in each dialect at
its defaults, and the length of the last step in learning rates.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
from matplotlib.figure import Figure

from optax_rms import dialects

DIALECTS = {
    "PyTorch": (dialects.torch.rmsprop(1.0), "tab:orange"),
    "Keras": (dialects.keras.rmsprop(1.0), "tab:blue"),
    "TensorFlow 1": (dialects.tensorflow.rmsprop(1.0), "tab:green"),
}
NUM_STEPS = 20


def main(folder: Path) -> None:
    figure = Figure(figsize=(12, 6.3), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.4, h_pad=0.4)
    text, axes = figure.subplots(1, 2, width_ratios=(1, 1.2))
    text.set_axis_off()
    text.text(0, 0.68, "optax_rms", fontsize=46, fontweight="bold")
    text.text(0, 0.54, "RMSProp for JAX", fontsize=28, color="0.3")
    lines = "in every framework's dialect,\ntested against the framework"
    text.text(0, 0.34, lines, fontsize=20, color="0.3", linespacing=1.5)

    gradients = jnp.logspace(-10, 2, 200)
    for name, (tx, color) in DIALECTS.items():
        state = tx.init(jnp.zeros(200))
        for _ in range(NUM_STEPS):
            updates, state = tx.update(gradients, state)
        axes.loglog(gradients, -updates, label=name, color=color, linewidth=4)
    axes.set(xlabel="gradient", ylabel="step, in learning rates", ylim=(1e-7, 30))
    axes.xaxis.label.set_size(16)
    axes.yaxis.label.set_size(16)
    axes.tick_params(labelsize=13)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=16, frameon=False)
    figure.savefig(folder / "card.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else Path(__file__).parent / "_static"))
