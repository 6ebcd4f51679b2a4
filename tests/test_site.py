# SPDX-License-Identifier: Apache-2.0
"""The picture that a link to the site is shown with."""

import pathlib
import runpy

import matplotlib.colors
import matplotlib.image
import numpy as np

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_card_has_the_size_of_cards_and_three_curves(tmp_path):
    main = runpy.run_path(str(DOCS / "draw_card.py"))["main"]
    main(tmp_path)
    drawn = matplotlib.image.imread(tmp_path / "card.png")
    assert drawn.shape == (630, 1200, 4)
    kept = matplotlib.image.imread(DOCS / "_static" / "card.png")
    # Versions of matplotlib differ in letters and margins, and hence by a pixel or two
    # of the six pixels of a curve.
    for color in ("tab:orange", "tab:blue", "tab:green"):
        curves = [
            np.abs(picture[..., :3] - matplotlib.colors.to_rgb(color)).max(-1) < 0.1
            for picture in (drawn, kept)
        ]
        assert np.sum(curves[0] & curves[1]) > 0.5 * np.sum(curves[0] | curves[1])
