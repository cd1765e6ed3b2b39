"""A joint graph in other tools' formats: Model Explorer, Graphviz, GraphML, and fx text pass by pass."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import fx

from gtcompile.costs.dependency_graph import dependencies
from gtcompile.costs.explain import alive_backward_nodes
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.graph.module_paths import block_of
from gtcompile.passes.dead_nodes import eliminate_dead_nodes
from gtcompile.passes.drop_gradients import drop_gradients
from gtcompile.passes.output_masks import narrow_output_masks
from gtcompile.tools.common.files import write_text
from gtcompile.tools.inspect.options import check_format


def export_graph(joint: JointGraph, trained: Set[str], path: Path) -> tuple[Path, ...]:
    """Write a joint graph in the format of the path's suffix.

    `.json` is Model Explorer's graph; its node data (FLOPs) goes to `NAME.flops.json` in the same folder.

    Args:
        joint: as captured, with every gradient live.
        trained: FQNs; nodes that only others need are marked eliminated.
        path: what to write.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown suffix.
        OSError: the file cannot be written.
    """
    check_format(path)
    if path.suffix == ".json":
        data = path.with_suffix(".flops.json")
        write_text(path, json.dumps(model_explorer_graph(joint, trained, path.stem)))
        write_text(data, json.dumps(model_explorer_flops(joint, path.stem)))
        return path, data
    if path.suffix == ".txt":
        write_text(path, text_by_pass(joint, trained))
    elif path.suffix == ".dot":
        write_text(path, dot(attributed_graph(joint, trained)))
    else:
        write_text(path, "\n".join(nx.generate_graphml(attributed_graph(joint, trained))) + "\n")
    return (path,)


def attributed_graph(joint: JointGraph, trained: Set[str]) -> "nx.DiGraph[str]":
    """The data flow by node name, with operator, phase, status, module, block, shape and FLOPs per node."""
    graph, alive = dependencies(joint), {node.name for node in alive_backward_nodes(joint, trained)}
    exported: nx.DiGraph[str] = nx.DiGraph()
    for node in joint.module.graph.nodes:
        if node.op == "output":
            continue
        known, given = graph.nodes[node.name], node.op == "placeholder"
        runs = given or known["direction"] == "forward" or node.name in alive
        exported.add_node(
            node.name,
            operator=known["operator"],
            phase="input" if given else known["direction"],
            status="runs" if runs else "eliminated",
            module=known["module"],
            block=block_of(known["module"]),
            shape=shape_of(node),
            flops=known["flops"],
        )
    exported.add_edges_from(graph.edges)
    return exported


def shape_of(node: fx.Node) -> str:
    """Type and shape of a node's value; empty if the value is not a single tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')} {' x '.join(map(str, value.shape)) or 'scalar'}"


def dot(graph: "nx.DiGraph[str]") -> str:
    """Graphviz text: a cluster per block, eliminated nodes dashed and grey."""
    lines = ["digraph joint {", "  node [shape=box, fontname=Helvetica];"]
    blocks: dict[str, list[str]] = {}
    for name, node in graph.nodes(data=True):
        blocks.setdefault(node["block"], []).append(name)
    for index, (block, names) in enumerate(blocks.items()):
        lines += [f"  subgraph cluster_{index} {{", f"    label={_quoted(block)};"]
        for name in names:
            node = graph.nodes[name]
            label = _quoted(f"{name}\n{node['operator']}\n{node['shape']}")
            style = ", style=dashed, color=gray, fontcolor=gray" if node["status"] == "eliminated" else ""
            lines.append(f"    {_quoted(name)} [label={label}{style}];")
        lines.append("  }")
    lines += [f"  {_quoted(source)} -> {_quoted(reader)};" for source, reader in graph.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def model_explorer_graph(joint: JointGraph, trained: Set[str], name: str) -> dict[str, Any]:
    """Model Explorer's graph collection: plain values, a namespace per phase and module."""
    graph = attributed_graph(joint, trained)
    return {"label": name, "graphs": [{"id": name, "nodes": [_explorer_node(graph, n) for n in graph]}]}


def _explorer_node(graph: "nx.DiGraph[str]", name: str) -> dict[str, Any]:
    node = graph.nodes[name]
    namespace = "/".join([node["phase"], *filter(None, node["module"].split("."))])
    edges = [
        {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(index)}
        for index, source in enumerate(graph.predecessors(name))
    ]
    attributes = [{"key": key, "value": str(node[key])} for key in ("status", "shape", "flops", "block")]
    return {
        "id": name,
        "label": node["operator"],
        "namespace": namespace,
        "incomingEdges": edges,
        "attrs": [{"key": "name", "value": name}, *attributes],
    }


def model_explorer_flops(joint: JointGraph, name: str) -> dict[str, Any]:
    """Model Explorer's node data: FLOPs by node, for colouring."""
    flops_by_node = dependencies(joint).nodes(data="flops")
    work = {name: {"value": flops} for name, flops in flops_by_node if flops}
    gradient = [{"stop": 0, "bgColor": "#fff7bc"}, {"stop": 1, "bgColor": "#d95f0e"}]
    return {name: {"results": work, "gradient": gradient}}


def text_by_pass(joint: JointGraph, trained: Set[str]) -> str:
    """The graph as readable fx text, as captured and after each pass."""
    stages = [("as captured", joint)]
    for name, edit in (
        ("after drop_gradients", lambda graph: drop_gradients(graph, trained)),
        ("after eliminate_dead_nodes", eliminate_dead_nodes),
        ("after narrow_output_masks", narrow_output_masks),
    ):
        stages.append((name, edit(stages[-1][1])))
    return "\n".join(
        f"# {name}: {len(stage.module.graph.nodes)} nodes, {len(stage.live)} gradients\n"
        + stage.module.print_readable(print_output=False)
        for name, stage in stages
    )
