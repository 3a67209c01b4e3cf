"""The documentation site: `make docs`."""

import pruneops

project = "pruneops"
version = release = pruneops.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "pruneops"
html_static_path = []

napoleon_google_docstring = False
autodoc_typehints = "none"  # docstrings give shapes and dtypes too
autodoc_member_order = "bysource"
myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 3
# Links to code and records lead out of the site: they work where the repository is read.
suppress_warnings = ["myst.xref_missing"]
