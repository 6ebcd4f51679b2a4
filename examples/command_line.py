# SPDX-License-Identifier: Apache-2.0
"""Command lines that refuse bad values in one line."""

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def run(
        self, work: Callable[[argparse.Namespace, str], None], argv: list[str] | None
    ) -> None:
        """Call ``work`` with the arguments, ``output`` a folder, and the command."""
        args = self.parse_args(argv)
        command = shlex.join([self.prog, *(sys.argv[1:] if argv is None else argv)])
        try:
            args.output.mkdir(parents=True, exist_ok=True)
            work(args, command)
        except OSError as error:
            self.error(str(error))
        except KeyboardInterrupt:
            self.exit(130, "\ninterrupted\n")


def number(
    kind: type, lowest: float, highest: float, description: str
) -> Callable[[str], Any]:
    """The argparse type of a number between two bounds, NaN excluded."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if lowest <= value <= highest:
            return value
        raise argparse.ArgumentTypeError(f"must be {description}, not {text!r}")

    return parse
