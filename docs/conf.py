# SPDX-License-Identifier: Apache-2.0
"""Settings of the documentation site: sphinx-build -W docs docs/_build."""

from importlib.metadata import version as installed_version

project = "optax_rms"
author = copyright = "the optax_rms authors"
version = release = installed_version("optax-rms")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
default_role = "py:obj"
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
napoleon_include_init_with_doc = False
