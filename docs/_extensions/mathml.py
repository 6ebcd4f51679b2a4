# SPDX-License-Identifier: Apache-2.0
"""Formulas as MathML, which browsers display without a script and without a network."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def write_mathml(translator, node):
    """Write a formula as MathML; TeX that docutils cannot convert fails the build."""
    tex, is_block = node.astext(), isinstance(node, nodes.math_block)
    if re.search(r"(frac|sqrt|\^|_) *\d\d", tex):
        # docutils reads one number: \frac12 becomes 12 over the next term.
        raise ValueError(f"{tex!r} needs braces, for example \\frac{{1}}{{2}}")
    mathml = tex2mathml(tex, as_block=is_block)
    # A wide formula scrolls in a box of its own, and the page does not.
    box = f'<div class="formula">{mathml}</div>' if is_block else mathml
    translator.body.append(box)
    raise nodes.SkipNode


def setup(app):
    renderers = (write_mathml, None), (write_mathml, None)
    app.add_html_math_renderer("mathml", *renderers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
