"""The book: notebooks as they ran on a card, the API from its docstrings, the measured figures.

Nothing is executed here and nothing is fetched: MathJax lies in _static (tools/mathjax.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from flashmla import __version__  # noqa: E402

project = "flashmla"
author = "the flashmla authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_nb",
    "sphinx_exercise",
    "generated_pages",
    "plain_docstrings",
]
exclude_patterns = ["_build", "executed", "_ext", "_static"]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Notebooks are shown as they were executed on a card, never run while the book is built.
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # its default loads from a CDN
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

html_theme = "sphinx_book_theme"
html_title = "flashmla"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_persistent": [],
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
# The file is whole as it stands; its menu alone would load more from elsewhere.
mathjax_path = "vendor/mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}
