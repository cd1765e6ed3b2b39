"""Where in a model a node of its joint graph belongs: its module, and that module's block."""

import re

from torch import fx

from gtcompile.graph.joint_graph import JointGraph, names_of
from gtcompile.torch_internals import ParamAOTInput

OUTSIDE = "(outside modules)"
"""Block of what belongs to no module with parameters."""


def block_of(module_path: str) -> str:
    """The repeated block a module lies in (`model.layers.1`), or the module itself."""
    block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", module_path)
    return block.group() if block else module_path or OUTSIDE


def block_of_parameter(fqn: str) -> str:
    """The block a parameter lies in."""
    return block_of(fqn.rpartition(".")[0])


def module_paths(joint: JointGraph) -> dict[fx.Node, str]:
    """Per node the path of the innermost module with parameters that it, or its forward, was captured in.

    What carries no origin (sums of gradients, an eager trace) stands where its last input stands; empty where
    there is nothing to go by.
    """
    known = _modules_with_parameters(joint)
    paths: dict[fx.Node, str] = {}
    for node in joint.module.graph.nodes:
        if node.op != "output":
            near = [paths[source] for source in node.all_input_nodes if paths[source]]
            paths[node] = _origin(node, known) or (near[-1] if near else "")
    return paths


def input_of(node: fx.Node) -> str:
    """What a placeholder stands for: `parameter FQN`, or `input`."""
    meaning = node.meta.get("desc")
    return f"parameter {_fqn(meaning)}" if isinstance(meaning, ParamAOTInput) else "input"


def _fqn(meaning: ParamAOTInput) -> str:
    return str(meaning.target).removeprefix("model.")


def _modules_with_parameters(joint: JointGraph) -> frozenset[str]:
    modules = (name.split(".")[:-1] for name in names_of(joint.parameters))
    return frozenset(".".join(parts[:n]) for parts in modules for n in range(1, len(parts) + 1))


def _origin(node: fx.Node, known: frozenset[str]) -> str:
    meaning = node.meta.get("desc")
    if isinstance(meaning, ParamAOTInput):
        return _fqn(meaning).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        parts = [part for part in re.split(r"[\[\]'\".]+", path) if part]
        for start in range(len(parts)):
            if (name := ".".join(parts[start:])) in known:
                return name
    return ""
