"""Imports point one way, by room; private torch names and bare folders do not appear where they may not."""

import ast
import collections
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gtcompile.passes
import gtcompile.tools

FOLDERS = {p.__name__: Path(str(p.__file__)).parent for p in (gtcompile, gtcompile.passes, gtcompile.tools)}
"""Where the packages lie: in the checkout, or in site-packages when a wheel is tested."""
FLOORS = [
    {"errors", "files", "lazy_names", "torch_internals"},
    {"graph"},
    {"passes", "distributed"},
    {"capture"},
    {"state"},
    {"costs", "importance"},
    {"compiler", "selection"},
    {"prices", "prefix"},
    {"training"},
    {"huggingface", "lightning", "policies", "testing"},
    {"tools"},
    {"cli"},
]
"""Rooms from the lowest floor up. A room imports from lower floors and from itself, never from beside it."""
TOOLS = [
    {"common"},
    {"models"},
    {"data"},
    {"runs"},
    {"inspect", "onnx", "bench", "compare"},
    {"finetune"},
    {"demo"},
]
"""The floors inside `tools`."""
PRODUCTS = {"inspect", "onnx", "bench", "compare", "finetune", "demo"}
NAMES_AND_NUMBERS = {"selection", "importance"}
"""Rooms that can be read, and replaced, without knowing graphs."""


def sources() -> dict[str, Path]:
    """Every source file by its dotted name; a package by the name of its folder."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


SOURCES = sources()


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


def edges() -> Iterator[tuple[str, str]]:
    """Importing and imported module, both ours."""
    for module in SOURCES:
        for imported in imports_of(module):
            if imported in SOURCES and imported != "gtcompile":
                yield module, imported


def room(module: str) -> str:
    """`costs` for `gtcompile.costs.budgets`; empty for `gtcompile` itself."""
    return module.split(".")[1] if "." in module else ""


def room_of_tools(module: str) -> str:
    """`inspect` for `gtcompile.tools.inspect.text`."""
    return module.split(".")[2] if module.count(".") > 1 else ""


def floor(name: str, floors: list[set[str]]) -> int:
    return next((i for i, rooms in enumerate(floors) if name in rooms), -1)


def upward(module: str, imported: str, floors: list[set[str]], room_of) -> bool:
    """Whether an import leaves its room for one that is not on a lower floor."""
    own, other = room_of(module), room_of(imported)
    return own != other and floor(other, floors) >= floor(own, floors)


def test_every_file_is_in_a_room_that_has_a_floor():
    rooms = {room(module) for module in SOURCES} - {"", "__main__"}
    assert rooms == set().union(*FLOORS)
    inside = {room_of_tools(m) for m in SOURCES if room(m) == "tools"} - {""}
    assert inside == set().union(*TOOLS)


def test_imports_go_down_only():
    wrong = [
        f"{module} imports {imported}"
        for module, imported in edges()
        if room(module) not in ("", "__main__") and upward(module, imported, FLOORS, room)
    ]
    assert not wrong


def test_imports_inside_tools_go_down_only():
    both = [(a, b) for a, b in edges() if room(a) == room(b) == "tools" and room_of_tools(a)]
    wrong = [f"{a} imports {b}" for a, b in both if upward(a, b, TOOLS, room_of_tools)]
    assert not wrong


def test_products_use_one_another_by_their_front_door():
    wrong = [
        f"{module} imports {imported}"
        for module, imported in edges()
        if {room_of_tools(module), room_of_tools(imported)} <= PRODUCTS
        and room_of_tools(module) != room_of_tools(imported)
        and imported.count(".") > 2
    ]
    assert not wrong


def test_passes_know_graphs_and_nothing_else():
    known = {"errors", "torch_internals", "graph", "passes"}
    wrong = [f"{a} imports {b}" for a, b in edges() if room(a) == "passes" and room(b) not in known]
    assert not wrong


def test_numbers_are_kept_apart_from_graphs():
    wrong = [
        module
        for module in SOURCES
        if room(module) in NAMES_AND_NUMBERS
        and any(name.startswith("torch.fx") for name in imports_of(module))
    ]
    assert not wrong


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


def private_names(module: str) -> list[str]:
    attributes = {dotted(node) for node in ast.walk(tree_of(module)) if isinstance(node, ast.Attribute)}
    return sorted(name for name in {*imports_of(module), *attributes} if is_private_torch(name))


def test_private_torch_names_enter_through_torch_internals_alone():
    reaching = {m: private_names(m) for m in SOURCES if m != "gtcompile.torch_internals"}
    assert not {module: names for module, names in reaching.items() if names}


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


def test_a_folder_of_the_package_or_its_tools_has_at_most_fourteen_modules():
    modules = (path for module, path in SOURCES.items() if room(module) != "passes")
    counts = collections.Counter(path.parent for path in modules if path.name != "__init__.py")
    assert {folder.name: n for folder, n in counts.items() if n > 14} == {}


def test_nothing_imports_the_bare_folders_or_the_benchmarks():
    roots = {module: {name.partition(".")[0] for name in imports_of(module)} for module in SOURCES}
    bare = {"passes", "tools", "tests", "benchmarks", "examples"}
    assert not {module: found & bare for module, found in roots.items() if found & bare}


def test_every_module_says_what_it_is():
    assert [m for m in SOURCES if not ast.get_docstring(tree_of(m))] == []
