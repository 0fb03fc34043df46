"""The site: `scripts/docs` builds it, and every warning is an error."""

import re
import sys
from pathlib import Path
from typing import Any

from ckptcoord.version import VERSION

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_extensions"))

project = "ckptcoord"
author = "The ckptcoord authors"
copyright = "The ckptcoord authors. Apache-2.0"  # noqa: A001 (Sphinx's word)
release = version = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "clireference"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_*"]
myst_heading_anchors = 3
default_role = "code"
smartquotes = False  # --graph is no dash

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else each attribute of a dataclass would be described twice

html_theme = "furo"
html_title = f"ckptcoord {VERSION}"
html_static_path = ["_static"]
html_css_files = ["sides.css"]
html_copy_source = False
html_show_sphinx = False

# Files of the repository that are no pages: the link goes, its text stays.
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def _unlink(app: Any, name: str, source: list[str]) -> None:  # noqa: ANN401 (Sphinx calls it)
    source[0] = _OUTSIDE.sub(r"\1", source[0])


def setup(app: Any) -> None:  # noqa: ANN401 (Sphinx's application)
    """Called by Sphinx."""
    app.connect("source-read", _unlink)
