"""The dependency graph: every use an edge, every attribute true, sums equal to the costs."""

import inspect

import networkx as nx
import pytest
import torch
from torch import fx, nn

from gtcompile import backward_costs, dependency_graph, train_only
from gtcompile.costs.dependency_graph import dependencies
from gtcompile.graph.joint_graph import JointGraph
from tests.support.graphs import capture_of
from tests.support.models import POOL, Recipe, Regression, make_batch, random_sets


def nodes_of(joint: JointGraph) -> list[fx.Node]:
    return [node for node in joint.module.graph.nodes if node.op != "output"]


@pytest.mark.parametrize("recipe", POOL[:3], ids=str)
def test_the_graph_has_a_node_per_node_and_an_edge_per_use(recipe):
    joint = capture_of(recipe)
    graph = dependencies(joint)
    assert set(graph) == {node.name for node in nodes_of(joint)}
    for node in nodes_of(joint):
        assert set(graph.predecessors(node.name)) == {source.name for source in node.all_input_nodes}


@pytest.mark.parametrize("recipe", POOL, ids=str)
def test_the_parameters_of_a_node_are_those_whose_gradients_it_leads_to(recipe):
    graph = dependencies(capture_of(recipe))
    gradients = {node: fqn for node, fqn in graph.nodes(data="gradient_of") if fqn}
    for node, parameters in graph.nodes(data="parameters"):
        reached = {gradients[end] for end in nx.descendants(graph, node) | {node} if end in gradients}
        assert parameters == reached


@pytest.mark.parametrize("recipe", POOL, ids=str)
def test_the_forward_is_what_the_loss_needs(recipe):
    joint = capture_of(recipe)
    graph = dependencies(joint)
    (loss, *others) = joint.outputs[: joint.forward_outputs]
    needed = set().union(*(nx.ancestors(graph, output.name) | {output.name} for output in (loss, *others)))
    inputs = {
        name for name, operator in graph.nodes(data="operator") if operator.startswith(("input", "param"))
    }
    forward = {name for name, direction in graph.nodes(data="direction") if direction == "forward"}
    assert forward == needed | inputs
    assert {direction for _, direction in graph.nodes(data="direction")} == {"forward", "backward"}


@pytest.mark.parametrize("recipe", [POOL[0], Recipe(("convolution",)), Recipe(("norm",), tied=True)], ids=str)
def test_flops_add_up_to_the_costs_of_any_trained_set(recipe):
    model, batch = recipe.model(), recipe.batch()
    graph, costs = dependency_graph(model, batch), backward_costs(model, batch)
    for trained in [*random_sets(sorted(costs.fqns), 4), costs.fqns, frozenset()]:
        flops = sum(
            node["flops"]
            for _, node in graph.nodes(data=True)
            if node["direction"] == "forward" or node["parameters"] & trained
        )
        assert flops == costs.step_flops(trained)


def test_nodes_say_their_operator_bytes_and_module():
    model = Regression(2)
    graph = dependency_graph(model, make_batch())
    products = [node for _, node in graph.nodes(data=True) if node["flops"]]
    assert {node["operator"] for node in products} <= {"aten.addmm.default", "aten.mm.default"}
    assert {node["module"] for node in products} == {"layers.0", "layers.1"}
    gradients = {fqn: node for _, node in graph.nodes(data=True) if (fqn := node["gradient_of"])}
    for name, parameter in model.named_parameters():
        assert gradients[name]["bytes"] == parameter.nbytes
    operators = {operator for _, operator in graph.nodes(data="operator")}
    assert operators > {"tangent", "input", *(f"parameter {name}" for name, _ in model.named_parameters())}


def test_what_is_trained_now_does_not_change_the_graph():
    model, batch = Regression(2), make_batch()
    before = dependency_graph(model, batch)
    train_only(model, ["layers.1.bias"])
    after = dependency_graph(model, batch)
    assert dict(after.nodes(data=True)) == dict(before.nodes(data=True))
    assert set(after.edges) == set(before.edges)


@pytest.mark.parametrize("function", [backward_costs, dependency_graph])
def test_a_loss_outside_of_the_model_is_a_keyword(function):
    parameters = inspect.signature(function).parameters
    assert list(parameters) == ["model", "batch", "loss_fn"]
    assert parameters["loss_fn"].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_chain_of_nodes_from_the_loss_leads_to_every_gradient():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x.square().mean()

    graph = dependency_graph(Chain(), {"x": torch.randn(2, 4)})
    (tangent,) = (name for name, operator in graph.nodes(data="operator") if operator == "tangent")
    gradients = {name: fqn for name, fqn in graph.nodes(data="gradient_of") if fqn}
    lengths = {fqn: nx.shortest_path_length(graph, tangent, name) for name, fqn in gradients.items()}
    assert len(lengths) == 6
    assert lengths["layers.0.weight"] > lengths["layers.1.weight"] > lengths["layers.2.weight"]
