# SPDX-License-Identifier: Apache-2.0
"""The table of a report: its words, the limits they begin at, its order and cells."""

import pytest

from optax_rms.monitoring import Figures
from optax_rms.monitoring._table import format_table, reasons

USUAL = Figures(
    elements=4000,
    gradient_rms=1e-2,
    update_rms=2e-3,
    parameter_rms=1.0,
    update_to_parameter=2e-3,
    rate_p01=0.05,
    rate_p50=0.1,
    rate_p99=0.4,
    ruled_by_eps=0.0,
    lost_to_rounding=0.004,
    at_cap=0.25,
    gradient_to_mean_square=1.5,
    noise_to_signal=None,
    zero_gradients=0.125,
    zero_updates=0.5,
    nonfinite=0.0,
    saturated_codes=None,
    state_bytes=16000,
)
# The figure, values in the usual range, a value out of it, and the words for that one.
LIMITS = [
    ("nonfinite", [0.0, None], 0.001, "<1 % not finite"),
    ("saturated_codes", [0.0, None], 0.25, "25 % of codes saturated"),
    ("zero_gradients", [0.0, 0.999], 1.0, "no gradient"),
    ("ruled_by_eps", [0.5, None], 0.51, "epsilon rules 51 %"),
    ("lost_to_rounding", [0.1, None], 0.11, "rounding takes 11 % of updates"),
    (
        "update_to_parameter",
        [1e-5, 1e-1, 0.0, None],
        0.9e-5,
        "update is 9e-06 of the parameter",
    ),
    (
        "update_to_parameter",
        [1e-5, 1e-1, 0.0, None],
        0.2,
        "update is 2e-01 of the parameter",
    ),
    ("at_cap", [0.5, None], 0.51, "51 % of mean squares are new"),
    (
        "gradient_to_mean_square",
        [4.0, None],
        9.0,
        "gradient is 3.0 times its usual size",
    ),
]


def words(figures):
    return [text for _, text in reasons(figures)]


@pytest.mark.parametrize(("figure", "usual", "unusual", "text"), LIMITS)
def test_words_for_what_is_out_of_the_usual_range(figure, usual, unusual, text):
    for value in usual:
        assert words(USUAL._replace(**{figure: value})) == []
    assert words(USUAL._replace(**{figure: unusual})) == [text]


def test_gradients_that_are_large_beside_new_mean_squares_are_no_spike():
    figures = USUAL._replace(at_cap=0.6, gradient_to_mean_square=9.0)
    assert words(figures) == ["60 % of mean squares are new"]


def test_worst_leaf_is_first_and_others_keep_their_order():
    leaves = {
        "usual": USUAL,
        "new": USUAL._replace(at_cap=1.0),
        "short": USUAL._replace(update_to_parameter=1e-6),
        "also usual": USUAL,
        "lost": USUAL._replace(lost_to_rounding=1.0, ruled_by_eps=0.5),
        "ruled": USUAL._replace(ruled_by_eps=1.0),
        "ruled as well": USUAL._replace(ruled_by_eps=0.75, at_cap=1.0),
        "idle": USUAL._replace(zero_gradients=1.0),
        "saturated": USUAL._replace(saturated_codes=0.1),
        "broken": USUAL._replace(nonfinite=1.0, ruled_by_eps=1.0),
        "spike": USUAL._replace(gradient_to_mean_square=100.0),
    }
    broken_whole = USUAL._replace(nonfinite=0.1)
    lines = format_table(leaves, broken_whole).splitlines()[1:]
    names = [line[: len("ruled as well")].rstrip() for line in lines]
    assert names == [
        *("broken", "saturated", "idle", "ruled", "ruled as well", "lost"),
        *("short", "new", "spike", "usual", "also usual", "all"),
    ]
    assert lines[0].endswith("  100 % not finite; epsilon rules 100 %")
    assert lines[4].endswith("  epsilon rules 75 %; 100 % of mean squares are new")
    # All leaves together, of which each has its own words, have none.
    assert lines[-1].endswith(" 16000")


def test_cells_are_aligned_and_untold_columns_left_out():
    ruled = USUAL._replace(elements=12, rate_p01=0.0, ruled_by_eps=1.0)
    table = format_table({"w": USUAL, "bias": ruled}, USUAL._replace(state_bytes=None))
    number = "1.0e-02  2.0e-03    1.0e+00  2.0e-03  1.0e-01"
    title = "gradient   update  parameter  upd/par     rate   p99/p1"
    ruled_text = "epsilon rules 100 %"
    assert table.splitlines() == [
        f"leaf  elements  {title}    eps  lost   cap    spike  zero  bytes",
        f"bias        12   {number}           100 %  <1 %  25 %  1.5e+00  12 %  16000"
        f"  {ruled_text}",
        f"w         4000   {number}  8.0e+00    0 %  <1 %  25 %  1.5e+00  12 %  16000",
        f"all       4000   {number}  8.0e+00    0 %  <1 %  25 %  1.5e+00  12 %",
    ]
    centered = format_table({"w": USUAL._replace(noise_to_signal=0.5)}, USUAL)
    assert "  noise  " in centered.splitlines()[0]
    assert "  5.0e-01  " in centered.splitlines()[1]
