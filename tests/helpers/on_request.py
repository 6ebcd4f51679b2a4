# SPDX-License-Identifier: Apache-2.0
"""Parameters of which some run by default, and all with `-m ""`."""

import pytest


def first_by_default(values, number=1):
    """The first parameters run by default, the others as slow tests."""
    return [
        pytest.param(
            *(value if type(value) is tuple else (value,)),
            marks=[] if i < number else [pytest.mark.slow],
        )
        for i, value in enumerate(values)
    ]


def all_by_default_but(slow, names):
    """The names run by default, those in the set `slow` as slow tests."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in slow else [])
        for name in names
    ]
