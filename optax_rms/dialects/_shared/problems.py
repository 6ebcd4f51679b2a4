# SPDX-License-Identifier: Apache-2.0
"""Problems, collected to be raised together."""

from collections.abc import Callable
from typing import Any


class Problems:
    """A list of problems, to be raised in one ``ValueError``."""

    def __init__(self, summary: str):
        """``summary`` opens the message, for example "the state cannot be imported"."""
        self._summary = summary
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)

    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the result of the function, or add its error and return ``None``."""
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            self.add(str(error))
            return None

    def raise_any(self) -> None:
        if self._lines:
            lines = "".join(f"\n- {line}" for line in self._lines)
            raise ValueError(f"{self._summary}:{lines}")
