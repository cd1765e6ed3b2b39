"""How Sphinx builds the documentation: `make docs`."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
release = version = PROJECT["version"]
html_title = f"{project} {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["gtcompile.css"]

extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

# The reference is read from the source without importing it, so that building needs no torch.
autoapi_dirs = [str(ROOT / "gtcompile")]
autoapi_generate_api_docs = False
autoapi_add_toctree_entry = False
autoapi_python_class_content = "class"
