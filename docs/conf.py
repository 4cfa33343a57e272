"""How Sphinx builds these pages: `make docs` writes them to site/, and a warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import svg_ear_compile

project = "svg-ear-compile"
author = "SVG-EAR Compile contributors"
project_copyright = author
version = release = svg_ear_compile.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
# Directives that a page needs stand between colons, so that GitHub shows their content as text.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "code"
highlight_language = "none"  # of blocks that name no language, such as commands

html_theme = "furo"
html_title = project
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fae", "color-brand-content": "#0b5fae"},
    "dark_css_variables": {"color-brand-primary": "#7cbcf5", "color-brand-content": "#7cbcf5"},
}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
