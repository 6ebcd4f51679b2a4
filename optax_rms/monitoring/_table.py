# SPDX-License-Identifier: Apache-2.0
"""A report as an aligned table, with the reasons for what is out of the usual range."""

from collections.abc import Callable, Mapping

from optax_rms.monitoring._figures import Figures

# Karpathy, 2015, CS231n notes, part 3: the ratio should be about 1e-3. Two decades
# around it are left alone: biases start from 0, and schedules end near 0.
LOWEST_CHANGE, HIGHEST_CHANGE = 1e-5, 1e-1
MOST_RULED = 0.5
MOST_AT_CAP = 0.5
MOST_LOST = 0.1
# A gradient of twice its usual size.
LARGEST_SPIKE = 4.0


def reasons(figures: Figures) -> list[tuple[int, str]]:
    """What is out of the usual range, in words, the worst first, each with its rank."""
    f = figures
    texts = [
        _above(f.nonfinite, 0, "{} not finite"),
        _above(f.saturated_codes, 0, "{} of codes saturated"),
        "no gradient" if f.zero_gradients == 1 else None,
        _above(f.ruled_by_eps, MOST_RULED, "epsilon rules {}"),
        _above(f.lost_to_rounding, MOST_LOST, "rounding takes {} of updates"),
        _change(f),
        _above(f.at_cap, MOST_AT_CAP, "{} of mean squares are new"),
        _spike(f),
    ]
    return [(rank, text) for rank, text in enumerate(texts) if text is not None]


def _change(f: Figures) -> str | None:
    ratio = f.update_to_parameter
    if not ratio or LOWEST_CHANGE <= ratio <= HIGHEST_CHANGE:
        return None
    return f"update is {ratio:.0e} of the parameter"


def _spike(f: Figures) -> str | None:
    ratio = f.gradient_to_mean_square or 0
    # Where the mean squares are new, this ratio tells no more than their decay.
    if ratio <= LARGEST_SPIKE or (f.at_cap or 0) > MOST_AT_CAP:
        return None
    return f"gradient is {ratio**0.5:.1f} times its usual size"


_COLUMNS: dict[str, Callable[[Figures], str]] = {
    "elements": lambda f: str(f.elements),
    "gradient": lambda f: _number(f.gradient_rms),
    "update": lambda f: _number(f.update_rms),
    "parameter": lambda f: _number(f.parameter_rms),
    "upd/par": lambda f: _number(f.update_to_parameter),
    "rate": lambda f: _number(f.rate_p50),
    "p99/p1": lambda f: _number(
        f.rate_p99 / f.rate_p01 if f.rate_p99 and f.rate_p01 else None
    ),
    "eps": lambda f: _percent(f.ruled_by_eps),
    "lost": lambda f: _percent(f.lost_to_rounding),
    "cap": lambda f: _percent(f.at_cap),
    "spike": lambda f: _number(f.gradient_to_mean_square),
    "noise": lambda f: _number(f.noise_to_signal),
    "zero": lambda f: _percent(f.zero_gradients),
    "bytes": lambda f: "" if f.state_bytes is None else str(f.state_bytes),
}


def format_table(leaves: Mapping[str, Figures], whole: Figures) -> str:
    """One line per leaf, the worst first, without columns in which nothing is told.

    Leaves whose worst reason is the same stand in the order of the gradients.
    """

    def rank(item: tuple[str, Figures]) -> float:
        return min((rank for rank, _ in reasons(item[1])), default=float("inf"))

    ordered = [*sorted(leaves.items(), key=rank), ("all", whole)]
    cells = {
        title: [cell(figures) for _, figures in ordered]
        for title, cell in _COLUMNS.items()
    }
    cells = {title: column for title, column in cells.items() if any(column)}
    names = ["leaf", *(name for name, _ in ordered)]
    columns = [[title, *column] for title, column in cells.items()]
    widths = [max(map(len, column)) for column in columns]
    width = max(map(len, names))
    # The line of all leaves together has no reasons of its own.
    notes = ["", *("; ".join(t for _, t in reasons(f)) for _, f in ordered[:-1]), ""]
    lines = []
    for i, name in enumerate(names):
        right = [column[i].rjust(w) for column, w in zip(columns, widths, strict=True)]
        lines.append("  ".join([name.ljust(width), *right, notes[i]]).rstrip())
    return "\n".join(lines)


def _above(share: float | None, most: float, text: str) -> str | None:
    is_above = share is not None and share > most
    return text.format(_percent(share)) if is_above else None


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    # A small share must not look like none at all.
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.005 else "<1 %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
