"""Settings of the documentation site: sphinx-build -W --keep-going -c doc . build/site

The source folder is the clone itself, so that every document stands where GitHub shows it, and links between documents and to the code
are the same in both. Which documents there are, in which order, follows from the links of doc/index.md: site/pages.py.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "doc" / "site"))

project = "llmc"
author = copyright = "The llmc authors"
release = version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton", "pages"]
root_doc = "doc/index"
include_patterns = ["*.md", "doc/**", "dev/kernels/*.md", "examples/*.md", "scripts/*.md"]
exclude_patterns = [".*", "build", "csrc", "doc/site", "runs", "src", "tests"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6
myst_url_schemes = ["http", "https", "mailto", "source"]  # source: site/pages.py
smartquotes = False  # quotes in docstrings are those of strings
nb_execution_mode = "off"  # dev/make_notebooks.py executes them

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
autodoc_default_options = {"members": True}
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False

mathjax_path = "https://cdn.jsdelivr.net/npm/mathjax@4.1.3/tex-mml-chtml.js"
html_theme = "furo"
html_title = "llmc"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
