"""Module paths of joint-graph nodes, and the repeated block that each module belongs to."""

import functools
import re
from collections.abc import Callable, Iterable

from torch import fx

from gtcompile.graph.joint_graph import JointGraph, names_of
from gtcompile.torch_internals import ParamAOTInput

OUTSIDE = "(outside modules)"
"""Block name for nodes that belong to no module with parameters."""


def block_of(module_path: str) -> str:
    """Return the repeated block that contains a module (`model.layers.1`), else the module's own path."""
    block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module_path)
    return block.group() if block else module_path or OUTSIDE


def block_of_parameter(fqn: str) -> str:
    """Return the block that contains a parameter."""
    return block_of(fqn.rpartition(".")[0])


def module_paths(joint: JointGraph) -> dict[fx.Node, str]:
    """Find for each node the innermost module with parameters that it was captured in.

    A backward node gets the module of its forward node. A node without recorded origin (a sum of gradients,
    any node of an eager trace) gets the path of its last input that has one, else the empty path.
    """
    innermost = functools.cache(functools.partial(_innermost, _modules_with_parameters(joint)))
    paths: dict[fx.Node, str] = {}
    for node in joint.module.graph.nodes:
        if node.op != "output":
            paths[node] = _origin(node, innermost) or _last(paths[source] for source in node.all_input_nodes)
    return paths


def _last(paths: Iterable[str]) -> str:
    """Return the last path that is not empty, else the empty path."""
    return next((path for path in reversed(list(paths)) if path), "")


def input_of(node: fx.Node) -> str:
    """Describe a placeholder: `parameter FQN`, or `input`."""
    meaning = node.meta.get("desc")
    return f"parameter {_fqn(meaning)}" if isinstance(meaning, ParamAOTInput) else "input"


def _fqn(meaning: ParamAOTInput) -> str:
    return str(meaning.target).removeprefix("model.")


def _modules_with_parameters(joint: JointGraph) -> frozenset[str]:
    modules = (name.split(".")[:-1] for name in names_of(joint.parameters))
    return frozenset(".".join(parts[:n]) for parts in modules for n in range(1, len(parts) + 1))


def _origin(node: fx.Node, innermost: Callable[[str], str]) -> str:
    meaning = node.meta.get("desc")
    if isinstance(meaning, ParamAOTInput):
        return _fqn(meaning).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return next((module for path, _ in reversed(stack.values()) if (module := innermost(path))), "")


def _innermost(known: frozenset[str], expression: str) -> str:
    """Return the longest suffix of an expression (`L['self'].layers[0]`) that is a known module path."""
    parts = [part for part in re.split(r"[\[\]'\".]+", expression) if part]
    suffixes = (".".join(parts[start:]) for start in range(len(parts)))
    return next((name for name in suffixes if name in known), "")
