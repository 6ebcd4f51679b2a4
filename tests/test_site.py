# SPDX-License-Identifier: Apache-2.0
"""The picture that a link to the site is shown with."""

import pathlib
import runpy

import matplotlib.image
import numpy as np

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_card_has_the_size_of_cards_and_three_curves(tmp_path):
    main = runpy.run_path(str(DOCS / "draw_card.py"))["main"]
    main(tmp_path)
    drawn = matplotlib.image.imread(tmp_path / "card.png")
    assert drawn.shape == (630, 1200, 4)
    kept = matplotlib.image.imread(DOCS / "_static" / "card.png")
    assert kept.shape == drawn.shape
    # Versions of matplotlib differ at the edges of letters and of lines.
    assert np.mean(np.abs(drawn - kept).max(axis=-1) > 0.5) < 0.02
