"""How Sphinx builds the documentation: `make docs`."""

import ast
import tomllib
from pathlib import Path
from typing import Any

import astroid
from astroid import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
release = version = PROJECT["version"]
html_title = f"{project} {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["gtcompile.css"]

extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
napoleon_use_ivar = True  # an "Attributes:" section describes attributes once, not twice

# The reference is read from the source without importing it, so that building needs no torch.
autoapi_dirs = [str(ROOT / "gtcompile")]
autoapi_generate_api_docs = False
autoapi_add_toctree_entry = False
autoapi_python_class_content = "class"
autoapi_options: list[str] = []
default_role = "code"  # docstrings write `names` in single backticks
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
html_show_copyright = False
html_show_sourcelink = False
# Inner modules import names that AutoAPI cannot follow; the reference shows none of them.
suppress_warnings = ["autoapi.python_import_resolution"]


def is_lazy(node: ast.stmt | nodes.NodeNG) -> bool:
    """Whether a statement of `gtcompile/__init__.py` is the block of imports for type checkers."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, nodes.If) and node.test.as_string() == "TYPE_CHECKING"


def public_names() -> set[str]:
    """The names that `gtcompile` imports lazily, read without importing the package."""
    tree = ast.parse((ROOT / "gtcompile" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for block in tree.body if is_lazy(block) for node in ast.walk(block)]
    return {
        alias.asname or alias.name
        for node in imports
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


LAZY = ("gtcompile", "gtcompile.lightning")
"""The packages that import their public names when these are first used."""


def lift_lazy_imports(package: nodes.Module) -> nodes.Module:
    """Show AutoAPI the lazy imports of a package, which stand under `if TYPE_CHECKING:`."""
    package.body = [inner for node in package.body for inner in (node.body if is_lazy(node) else [node])]
    for node in package.body:
        node.parent = package
    return package


astroid.MANAGER.register_transform(nodes.Module, lift_lazy_imports, lambda module: module.name in LAZY)


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, which `make docs` turns into an error, about public names that the reference lacks."""
    described = {name.rpartition(".")[2] for name, *_ in env.get_domain("py").get_objects()}
    for name in sorted(public_names() - described):
        logging.getLogger(__name__).warning("gtcompile.%s is public and not in the reference", name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("env-check-consistency", check_reference)
    return {"parallel_read_safe": True}
