"""without_zero_tangents: what only zeros lead to goes, the rest computes the same."""

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from gtcompile.passes.zero_tangents import without_zero_tangents
from tests.support.graphs import operators, run_graph

aten = torch.ops.aten
SHAPE = (3, 3)
STEPS = st.tuples(st.sampled_from("+*@-c"), st.integers(0, 9), st.integers(0, 9))
"""An operator and which earlier values it reads."""


def graph_of(function) -> fx.GraphModule:
    """The operators a function of a weight and tangents calls, with shapes."""
    values = [torch.randn(SHAPE) for _ in range(function.__code__.co_argcount)]
    return torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(*values)


def narrowed(function, *zero: int) -> fx.GraphModule:
    """Without the tangents at some positions; the weight is at 0, all other arguments are tangents."""
    return without_zero_tangents(graph_of(function), range(1, function.__code__.co_argcount), set(zero))


def results(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    return run_graph(graph, inputs)


def two_paths(w, dy, ds):
    return (dy @ w + ds @ w, ds @ w.t())


def test_a_sum_with_zeros_is_its_other_summand_and_what_only_zeros_reach_is_no_gradient():
    graph = narrowed(two_paths, 2)
    first, second = graph.graph.output_node().args[0]
    assert first.target is aten.mm.default
    assert second is None


def test_nothing_zero_changes_nothing():
    assert operators(narrowed(two_paths)) == operators(graph_of(two_paths))


def test_other_readers_of_zeros_read_a_constant():
    graph = narrowed(lambda w, dy, ds: (torch.cat([dy @ w, ds @ w]) * 2,), 2)
    cat = graph.graph.find_nodes(op="call_function", target=aten.cat.default)[0]
    assert [node.target for node in cat.all_input_nodes] == [aten.mm.default, aten.full.default]


def test_a_value_made_in_the_shape_of_a_zero_tangent_is_not_zero():
    graph = narrowed(lambda w, dy, ds: (dy @ w + torch.ones_like(ds),), 2)
    dy = torch.randn(SHAPE)
    (result,) = results(graph, [torch.eye(3), dy, torch.zeros(SHAPE)])
    assert torch.equal(result, dy + 1)


@settings(max_examples=15)
@given(st.lists(STEPS, min_size=1, max_size=12))
def test_the_same_is_computed_as_from_zeros(steps):
    def backward(w, a, b, c):
        values = [a, b, c]
        for kind, left, right in steps:
            x, y = values[left % len(values)], values[right % len(values)]
            step = {"+": x + y, "-": x - y, "*": x * w, "@": x @ w, "c": torch.cat([x, y])[1:4]}
            values.append(step[kind])
        return tuple(values[3:])

    graph = graph_of(backward)
    w, a, b = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for zero in ({3}, {2, 3}, {1}):
        inputs = [w, *(torch.zeros(SHAPE) if i in zero else t for i, t in ((1, a), (2, b), (3, a + b)))]
        reached = results(without_zero_tangents(graph, (1, 2, 3), zero), inputs)
        for ours, theirs in zip(reached, results(graph, inputs), strict=True):
            assert not theirs.any() if ours is None else torch.equal(ours, theirs)
