# SPDX-License-Identifier: Apache-2.0
"""Complaints, collected to be raised together."""

from collections.abc import Callable
from typing import Any


class Problems:
    """Collects complaints, to raise them all in one ``ValueError``."""

    def __init__(self, summary: str):
        """``summary`` opens the message: "the state dict cannot be imported"."""
        self._summary = summary
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)

    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function returns, or ``None`` if it complains."""
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            self.add(str(error))
            return None

    def raise_any(self) -> None:
        if self._lines:
            lines = "".join(f"\n- {line}" for line in self._lines)
            raise ValueError(f"{self._summary}:{lines}")
