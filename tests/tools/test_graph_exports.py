"""Exports of a joint graph: readers of the formats get the nodes, edges and statuses that the graph has."""

import json
import re
from pathlib import Path

import networkx as nx
import pytest

from gtcompile.costs.backward_costs import costs_of
from gtcompile.costs.dependency_graph import work_by_node
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.tools.inspect.graph_exports import export_graph
from tests.support.graphs import capture_of
from tests.support.models import POOL


@pytest.fixture(scope="module")
def joint() -> JointGraph:
    return capture_of(POOL[0])


@pytest.fixture(scope="module")
def trained(joint: JointGraph) -> frozenset[str]:
    return frozenset(sorted(joint.live)[-1:])


def names(joint: JointGraph) -> set[str]:
    return {node.name for node in joint.module.graph.nodes if node.op != "output"}


def eliminated(joint: JointGraph, trained: frozenset[str]) -> set[str]:
    gone = names(joint) - names(restrict_gradients(joint, trained))
    forward = {node.name for node in joint.forward_nodes()}
    assert gone - forward
    return gone - forward


def uses(joint: JointGraph) -> set[tuple[str, str]]:
    """Which node reads which, by name."""
    nodes = [node for node in joint.module.graph.nodes if node.op != "output"]
    return {(source.name, node.name) for node in nodes for source in node.all_input_nodes}


def test_graphml_has_every_node_edge_and_what_is_eliminated(
    joint: JointGraph, trained: frozenset[str], tmp_path: Path
) -> None:
    export_graph(joint, trained, tmp_path / "graph.graphml")
    graph = nx.read_graphml(tmp_path / "graph.graphml")
    assert set(graph) == names(joint)
    assert set(graph.edges) == uses(joint)
    marked = {name for name, node in graph.nodes(data=True) if node["status"] == "eliminated"}
    assert marked == eliminated(joint, trained)
    inputs = {node["operator"] for _, node in graph.nodes(data=True) if node["phase"] == "input"}
    assert inputs == {"input", "tangent", *(f"parameter {p.fqn}" for p in joint.parameters)}
    assert sum(node["flops"] for _, node in graph.nodes(data=True)) == costs_of(joint).full_flops


def test_model_explorer_gets_a_collection_and_node_data(
    joint: JointGraph, trained: frozenset[str], tmp_path: Path
) -> None:
    written = export_graph(joint, trained, tmp_path / "graph.json")
    assert written == (tmp_path / "graph.json", tmp_path / "graph.flops.json")
    (graph,) = json.loads(written[0].read_text())["graphs"]
    assert {node["id"] for node in graph["nodes"]} == names(joint)
    edges = {(e["sourceNodeId"], n["id"]) for n in graph["nodes"] for e in n["incomingEdges"]}
    assert edges == uses(joint)
    gone = eliminated(joint, trained)
    for node in graph["nodes"]:
        attributes = {a["key"]: a["value"] for a in node["attrs"]}
        assert (attributes["status"] == "eliminated") == (node["id"] in gone)
    results = json.loads(written[1].read_text())[graph["id"]]["results"]
    assert {name: result["value"] for name, result in results.items()} == {
        node.name: flops for node, flops in work_by_node(joint.module.graph.nodes).items() if flops
    }


def test_dot_has_every_node_once_and_eliminated_ones_dashed(
    joint: JointGraph, trained: frozenset[str], tmp_path: Path
) -> None:
    export_graph(joint, trained, tmp_path / "graph.dot")
    text = (tmp_path / "graph.dot").read_text()
    nodes = dict(re.findall(r'^    "(\w+)" \[(.*)\];$', text, re.MULTILINE))
    assert set(nodes) == names(joint)
    assert {name for name, rest in nodes.items() if "dashed" in rest} == eliminated(joint, trained)
    assert text.count(" -> ") == len(uses(joint))
    assert text.count("{") == text.count("}")


def test_text_shows_the_graph_after_each_pass(
    joint: JointGraph, trained: frozenset[str], tmp_path: Path
) -> None:
    export_graph(joint, trained, tmp_path / "graph.txt")
    text = (tmp_path / "graph.txt").read_text()
    counts = [int(n) for n in re.findall(r"^# .*: (\d+) nodes", text, re.MULTILINE)]
    assert counts[0] == counts[1] == len(joint.module.graph.nodes)
    assert counts[-1] == len(restrict_gradients(joint, trained).module.graph.nodes) < counts[0]


def test_an_unknown_suffix_is_refused(joint: JointGraph, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a file ending in .json, .dot, .graphml, .txt"):
        export_graph(joint, joint.live, tmp_path / "graph.svg")
    assert not list(tmp_path.iterdir())
