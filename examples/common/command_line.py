# SPDX-License-Identifier: Apache-2.0
"""Command lines that refuse bad values in one line."""

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class InputError(Exception):
    """An argument or a file cannot be used; the message says why, in one line."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and adds defaults, except None and flags."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.nargs != 0 and action.default is not None
        return f"{action.help}, default %(default)s" if has_default else action.help


class Parser(argparse.ArgumentParser):
    """Arguments of a program; an error is one line, without the usage before it.

    Args:
      file: path of the program, whose last part is the name in messages.
      description: text of ``--help``.
      output: default of ``--output``, the folder for the results.
    """

    def __init__(self, file: str, description: str | None, output: str) -> None:
        super().__init__(
            prog=Path(file).name,
            description=description,
            formatter_class=_HelpFormatter,
        )
        self.add_argument(
            "--output", type=Path, default=Path(output), help="folder for the results"
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def run(
        self,
        work: Callable[[argparse.Namespace], None],
        argv: list[str] | None,
        advice: str = "",
    ) -> None:
        """Calls ``work`` with the arguments, and reports its errors in one line.

        ``args.command`` is the command itself, for the file of results. ``advice``
        completes the message after an interrupt from the keyboard.
        """
        args = self.parse_args(argv)
        args.command = shlex.join(
            [self.prog, *(sys.argv[1:] if argv is None else argv)]
        )
        try:
            work(args)
        except (InputError, OSError) as error:
            self.error(str(error))
        except KeyboardInterrupt:
            self.exit(130, f"\ninterrupted{advice}\n")


def number(
    kind: type, lowest: float, highest: float, description: str
) -> Callable[[str], Any]:
    """The argparse type of a number between two bounds, NaN excluded.

    For example, ``number(int, 0, 9, "a digit")`` turns ``"7"`` into 7 and rejects
    ``"10"``, ``"0.5"`` and ``"nan"``.
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if lowest <= value <= highest:
            return value
        raise argparse.ArgumentTypeError(f"must be {description}, not {text!r}")

    return parse


def count(lowest: int = 1) -> Callable[[str], int]:
    """The argparse type of a number of epochs or steps."""
    return number(int, lowest, 10**6, f"a whole number of at least {lowest}")


positive = number(float, 1e-30, 1e30, "a number from 1e-30 to 1e30")
fraction = number(float, 0, math.nextafter(1, 0), "a number in [0, 1)")
seed = number(int, 0, 2**32 - 1, "a whole number in [0, 2**32)")
