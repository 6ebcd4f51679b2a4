# SPDX-License-Identifier: Apache-2.0
"""Settings of the documentation site: sphinx-build -W docs docs/_build."""

import re
from importlib.metadata import version as installed_version

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "optax_rms"
author = copyright = "the optax_rms authors"
version = release = installed_version("optax-rms")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
# Browsers display MathML without a script and without a network. MathJax, the default,
# comes from a server, and a page without a network shows the TeX source.
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
default_role = "py:obj"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
napoleon_include_init_with_doc = False


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
