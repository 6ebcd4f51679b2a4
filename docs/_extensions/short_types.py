# SPDX-License-Identifier: Apache-2.0
"""Types in signatures under the names of the source, for example ``ArrayLike``.

Python evaluates annotations, and of ``ArrayLike`` a union of eight types remains.
"""

from jax.typing import ArrayLike, DTypeLike
from sphinx.util.typing import stringify_annotation

from optax_rms._types import LearningRate

# A learning rate contains the union of ArrayLike, and is replaced before.
ALIASES = {
    "LearningRate": LearningRate,
    "ArrayLike": ArrayLike,
    "DTypeLike": DTypeLike,
}


def shorten(text):
    if text is None:
        return None
    for name, alias in ALIASES.items():
        text = text.replace(stringify_annotation(alias, "smart"), name)
    return text


def shorten_signature(app, what, name, obj, options, arguments, returns):
    return shorten(arguments), shorten(returns)


def setup(app):
    app.connect("autodoc-process-signature", shorten_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
