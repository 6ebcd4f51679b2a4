# SPDX-License-Identifier: Apache-2.0
"""The fields of a chain's state by name, whatever the order of its steps."""

from typing import Any


def fields(state: Any) -> dict[str, Any]:
    """The fields in the state of a chain by name, without those that are ``None``."""
    return {
        name: value
        for part in state
        for name, value in part._asdict().items()
        if value is not None
    }


def with_fields(state: Any, new: dict[str, Any]) -> Any:
    """The state of a chain with these in place of the fields that are not ``None``."""
    return tuple(
        part._replace(**{k: new[k] for k in fields([part]).keys() & new.keys()})
        for part in state
    )
