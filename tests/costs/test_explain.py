"""Why a node runs: every path is real, ends in a gradient, and what it names decides."""

import itertools

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcompile.costs import dependency_graph
from gtcompile.costs.backward_costs import costs_of
from gtcompile.costs.dependency_graph import dependencies
from gtcompile.costs.explain import (
    alive_backward_nodes,
    compare_trained_sets,
    explain,
    saved_bytes,
)
from gtcompile.graph.joint_graph import JointGraph
from gtcompile.passes.pipeline import restrict_gradients
from tests.support.graphs import capture_of
from tests.support.models import POOL


def names(joint: JointGraph) -> list[str]:
    return [node.name for node in joint.module.graph.nodes if node.op != "output"]


def drawn_set(data: st.DataObject, joint: JointGraph) -> frozenset[str]:
    return frozenset(data.draw(st.sets(st.sampled_from(sorted(joint.live)), min_size=1)))


@settings(max_examples=60)
@given(st.data())
def test_every_path_is_real_ends_in_a_live_gradient_and_freezing_what_it_names_eliminates_the_node(data):
    joint = capture_of(data.draw(st.sampled_from(POOL)))
    trained = drawn_set(data, joint)
    why = explain(joint, data.draw(st.sampled_from(names(joint))), trained)
    restricted = restrict_gradients(joint, trained)
    assert why.alive == (why.node in names(restricted))
    if why.path:
        graph = dependencies(restricted if why.needed_by else joint)
        assert set(itertools.pairwise(why.path)) <= set(graph.edges)
        assert why.path[0] == why.node
        source = restricted if why.needed_by else joint
        slots = zip(source.slots, source.gradients, strict=True)
        assert why.path[-1] in {node.name for slot, node in slots if node is not None and slot == why.reached}
    if why.phase == "backward":
        assert bool(why.path) == bool(why.needed_by | why.would_need)
        without = restrict_gradients(joint, trained - why.needed_by)
        assert why.node not in names(without)


def test_what_the_property_says_is_met_by_nodes_of_every_kind():
    joint = capture_of(POOL[0])
    trained = frozenset(sorted(joint.live)[-2:])
    reasons = [explain(joint, name, trained) for name in names(joint)]
    kinds = {(why.phase, why.alive, bool(why.path), bool(why.needed_by)) for why in reasons}
    assert kinds >= {
        ("backward", True, True, True),
        ("backward", False, True, False),
        ("forward", True, True, True),
    }
    assert max(len(why.path) for why in reasons if why.needed_by) > 2
    assert {why.reached for why in reasons if why.needed_by} == trained


@settings(max_examples=30)
@given(st.data())
def test_what_freezing_frees_is_the_difference_of_the_costs(data):
    joint = capture_of(data.draw(st.sampled_from(POOL)))
    costs, trained = costs_of(joint), drawn_set(data, joint)
    why = explain(joint, data.draw(st.sampled_from(names(joint))), trained)
    cost = costs.step_flops(trained)
    assert why.freed_flops == {f: cost - costs.step_flops(trained - {f}) for f in why.needed_by}
    assert why.freed_together_flops == cost - costs.step_flops(trained - why.needed_by)


@settings(max_examples=30)
@given(st.data())
def test_a_difference_adds_up_and_names_the_nodes_that_the_rewritten_graphs_have(data):
    joint = capture_of(data.draw(st.sampled_from(POOL)))
    costs, before, after = costs_of(joint), drawn_set(data, joint), drawn_set(data, joint)
    difference = compare_trained_sets(joint, before, after)
    flops = costs.step_flops(after) - costs.step_flops(before)
    assert difference.gained_flops - difference.lost_flops == flops
    had, has = (set(names(restrict_gradients(joint, trained))) for trained in (before, after))
    assert set(difference.appeared) == has - had
    assert set(difference.gone) == had - has
    change = saved_bytes(joint, after) - saved_bytes(joint, before)
    assert difference.gained_bytes - difference.lost_bytes == change
    assert compare_trained_sets(joint, after, before).appeared == difference.gone


@settings(max_examples=20)
@given(st.data())
def test_training_more_never_saves_less_and_never_runs_less(data):
    joint = capture_of(data.draw(st.sampled_from(POOL)))
    some, more = drawn_set(data, joint), drawn_set(data, joint)
    assert alive_backward_nodes(joint, some) <= alive_backward_nodes(joint, some | more)
    assert saved_bytes(joint, some) <= saved_bytes(joint, some | more)


def test_a_parameter_is_explained_by_its_gradient_and_the_way_from_the_loss():
    joint = capture_of(POOL[0])
    fqn = sorted(joint.live)[0]
    why = explain(joint, fqn, joint.live)
    assert why.alive
    assert why.path == (why.node,)
    assert why.reached == fqn
    assert nx.is_path(dependencies(joint), why.chain)
    assert "runs for 1 trained" in str(why)
    frozen = explain(joint, fqn, joint.live - {fqn})
    assert not frozen.alive
    assert "eliminated" in str(frozen)


def test_a_misspelt_name_lists_near_ones():
    joint = capture_of(POOL[0])
    fqn = sorted(joint.live)[0]
    with pytest.raises(ValueError, match=f"no parameter or node is called.*near names:.*{fqn}"):
        explain(joint, fqn[:-1], joint.live)
    with pytest.raises(ValueError, match="has no gradient to train"):
        explain(joint, fqn, frozenset({"weigth"}))


def test_explaining_costs_as_many_formulas_whatever_the_number_of_parameters(monkeypatch):
    joint, calls = capture_of(POOL[0]), []
    needed_most, counted = node_needed_most(joint), dependency_graph.node_flops
    monkeypatch.setattr(dependency_graph, "node_flops", lambda node: calls.append(node) or counted(node))
    why = explain(joint, needed_most, joint.live)
    assert len(why.freed_flops) > 3
    assert len(calls) == len(set(calls)) <= len(joint.module.graph.nodes)


def node_needed_most(joint: JointGraph) -> str:
    """The backward node that most parameters need."""
    nodes = dependencies(joint).nodes(data=True)
    return max((len(node["parameters"]), name) for name, node in nodes if node["direction"] == "backward")[1]
