# SPDX-License-Identifier: Apache-2.0
"""Command lines that refuse bad values in one line."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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
