"""Imports point one way; private torch names and bare folders do not appear where they may not."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gtcompile.passes
import gtcompile.tools

ROOT = Path(__file__).parent.parent
PACKAGES = (gtcompile, gtcompile.passes, gtcompile.tools)
FOLDERS = {package.__name__: Path(str(package.__file__)).parent for package in PACKAGES}
"""Where the packages lie: in the checkout, or in site-packages when a wheel is tested."""

ORDER = [
    *("errors", "budgets", "ranks", "torch_internals", "fully_sharded", "random_states", "joint"),
    *("flops", "packed_sequences", "known_values", "originals", "asked", "routes", "capture"),
    *("passes.contract", "passes.weight_gradients", "passes.dead_nodes", "passes.output_masks"),
    *("passes.tangents", "passes.split_convolutions", "passes.zero_tangents", "passes.hoisting"),
    *("passes.pipeline", "passes"),
    *(
        "trained",
        "restoration",
        "dependencies",
        "gradient_stream",
        "optimizer_updates",
        "importance",
        "knapsack",
        "selection",
        "explanations",
    ),
    *(
        "code_objects",
        "cuts",
        "forced_leaves",
        "first_forward",
        "region_graph",
        "autograd_nodes",
        "operators",
        "programs",
        "products",
        "partitions",
        "background",
        "parts",
        "uncompiled",
        "frozen",
        "side_work",
        "specialized",
        "plans",
        "hoisted",
        "regions",
        "backend",
        "blocks",
    ),
    *(
        "frozen_state",
        "data_parallel",
        "adaptive",
        "training_state",
        "complete_state",
        "trainer_settings",
        "trainer_loss",
        "huggingface",
        "testing",
        "tools",
        "cli",
        "__main__",
    ),
]
"""From what everything may import down to what nothing imports; a new module takes its place here."""
AWAY_FROM_FX = {"selection", "knapsack", "importance", "optimizer_updates"}
"""Stages that work on numbers and names: they can be read, and replaced, without knowing graphs."""


def module_name(path: Path) -> str:
    """Dotted name of a source file, as it is imported."""
    package = next(name for name, folder in FOLDERS.items() if path.parent == folder)
    return package if path.stem == "__init__" else f"{package}.{path.stem}"


SOURCES = {module_name(p): p for folder in FOLDERS.values() for p in sorted(folder.glob("*.py"))}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text())


def imports_of(module: str) -> Iterator[str]:
    """Dotted names of what a module imports, at its top or inside a function."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in SOURCES or node.module in ("torch",) else str(node.module)


def layer(module: str) -> str:
    """Place of a module in the order; `tools` is one layer."""
    short = module.removeprefix("gtcompile.")
    return "tools" if short.startswith("tools") else short


def dotted(node: ast.expr) -> str:
    """`torch._C.x` for that expression; empty for anything but a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def is_private_torch(name: str) -> bool:
    """Whether a dotted name reaches into a private part of torch; operators' own names do not count."""
    parts = name.split(".")
    return parts[0] == "torch" and parts[1:2] != ["ops"] and any(re.match("_(?!_)", part) for part in parts)


@pytest.mark.parametrize("module", [m for m in SOURCES if m != "gtcompile"])
def test_a_module_imports_only_what_comes_before_it(module):
    assert layer(module) in ORDER, f"{module} has no place in ORDER"
    for imported in imports_of(module):
        if imported in SOURCES and imported != "gtcompile" and layer(imported) != layer(module):
            upward = f"{module} imports {imported}, which comes after it"
            assert ORDER.index(layer(imported)) < ORDER.index(layer(module)), upward


def test_the_order_names_no_module_that_is_gone():
    known = {layer(module) for module in SOURCES} | {"huggingface"}
    assert set(ORDER) <= known


def test_the_order_can_tell_an_upward_import():
    assert ORDER.index("joint") < ORDER.index("passes.pipeline") < ORDER.index("regions")
    assert "gtcompile.passes.pipeline" in set(imports_of("gtcompile.specialized"))
    assert "gtcompile.trained" in set(
        imports_of("gtcompile.regions")
    )  # written `from gtcompile import trained`


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("gtcompile.passes")])
def test_passes_can_be_read_alone(module):
    allowed = {"errors", "joint", "flops"}
    for imported in imports_of(module):
        if imported in SOURCES and not imported.startswith("gtcompile.passes"):
            assert layer(imported) in allowed, f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(AWAY_FROM_FX))
def test_numbers_are_kept_apart_from_graphs(module):
    imported = set(imports_of(f"gtcompile.{module}"))
    assert not any(name.startswith(("torch.fx", "networkx")) for name in imported)


@pytest.mark.parametrize("module", [m for m in SOURCES if m != "gtcompile.torch_internals"])
def test_private_torch_names_enter_through_torch_internals_alone(module):
    names = {dotted(node) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Attribute)}
    private = sorted(name for name in {*imports_of(module), *names} if is_private_torch(name))
    assert not private, f"{module} reaches into {private}"


@pytest.mark.parametrize(
    ("name", "private"),
    [
        ("torch._dynamo.config", True),
        ("torch.fx.graph._BoxedCodeGen", True),
        ("torch.ops.aten._unsafe_view", False),
        ("torch.autograd.graph", False),
        ("torch.__version__", False),
        ("model._parameters", False),
    ],
)
def test_a_private_name_is_recognised(name, private):
    assert is_private_torch(name) is private


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_imports_the_bare_folders(module):
    roots = {name.partition(".")[0] for name in imports_of(module)}
    assert not roots & {"passes", "tools", "tests"}


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(tree_of(module)), f"{module} has no docstring"


def test_the_folders_are_packages_of_gtcompile_when_installed():
    import gtcompile.passes
    import gtcompile.tools

    assert gtcompile.passes.__name__ == "gtcompile.passes"
    assert gtcompile.tools.__name__ == "gtcompile.tools"
