# SPDX-License-Identifier: Apache-2.0
"""How messages name a leaf of a tree."""

from typing import Any

import jax


def leaf_name(path: Any) -> str:
    """The path as JAX writes it: ``['layer']['kernel']``."""
    return jax.tree_util.keystr(path) or "the only leaf"


def dotted_name(path: Any) -> str:
    """Keys and indices joined by dots, as in checkpoints: ``layer.kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "the only leaf"
