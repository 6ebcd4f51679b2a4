# SPDX-License-Identifier: Apache-2.0
"""Settings of the documentation site: sphinx-build -W docs docs/_build."""

import os
import pathlib
import sys
from importlib.metadata import metadata

sys.path.append(str(pathlib.Path(__file__).parent / "_extensions"))

project = "optax_rms"
author = copyright = "the optax_rms authors"
version = release = metadata("optax-rms")["Version"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "llms_txt",
    "mathml",
    "short_types",
    "social_card",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"optax_rms {version}"
html_short_title = metadata("optax-rms")["Summary"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"
# The address of the site, which Read the Docs puts into this variable.
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
copybutton_exclude = ".linenos, .gp, .go"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]

# Results are kept beside the output folder. CI has none, and executes all notebooks.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"
nb_execution_show_tb = True

default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_include_init_with_doc = False
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

# A reference that leads nowhere is an error, except to names of other packages: their
# pages are on other sites, and the build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", "LearningRate|ArrayLike|DTypeLike"),
    ("py:.*", r"(jax|numpy|np|optax|collections|typing|os|pathlib)\..*"),
]
