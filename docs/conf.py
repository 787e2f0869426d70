"""Sphinx settings."""

from hpc_closure import __version__

project = "hpc_closure"
author = "the hpc_closure developers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_mock_imports = ["deepspeed", "mpi4py"]
autodoc_typehints = "none"
napoleon_google_docstring = True
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "hpc_closure"
