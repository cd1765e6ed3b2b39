"""Hoisting: chain and leaves together compute the backward, for any set, with no more than its FLOPs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from gtcompile.capture.capture import capture
from gtcompile.graph.joint_graph import ancestors
from gtcompile.passes.hoisting import extract, hoist_weight_gradients, leaf_nodes
from tests.support.graphs import (
    backward_of,
    capture_of,
    flops_of,
    operators,
    random_inputs,
    run_graph,
    text_of,
)
from tests.support.models import POOL, RANDOM_LAYERS, Recipe, Regression, make_batch

aten = torch.ops.aten
DETERMINISTIC = [recipe for recipe in POOL if RANDOM_LAYERS.isdisjoint(recipe.layers)]


def slots_of(backward: fx.GraphModule) -> list[fx.Node | None]:
    return list(backward.graph.output_node().args[0])


def run_in_parts(hoisted, inputs, live):
    """What the chain and the leaves of the live slots compute, per slot."""
    computed = run_graph(hoisted.chain.module, [inputs[i] for i in hoisted.chain.inputs])
    gradients = {slot: computed[i] for i, slot in enumerate(hoisted.chain_slots)}
    computed += [None] * hoisted.handed_on
    for leaf in hoisted.leaves:
        if leaf.serves & live:
            operands = [inputs[o.index] if o.saved else computed[o.index] for o in leaf.operands]
            results = leaf.module(*operands)
            gradients |= zip(leaf.slots, results, strict=False)
            for place, value in zip(leaf.handed_on, results[len(leaf.slots) :], strict=True):
                computed[place] = value
    return gradients


def same(left, right) -> bool:
    return left is right is None or torch.equal(left, right)


@settings(max_examples=40)
@given(st.sampled_from(DETERMINISTIC), st.data())
def test_chain_and_leaves_compute_what_the_backward_computes(recipe, data):
    backward = backward_of(capture_of(recipe))
    inputs, gradients = random_inputs(backward), slots_of(backward)
    slots = {slot for slot, gradient in enumerate(gradients) if gradient is not None}
    hoist = data.draw(st.sets(st.sampled_from(sorted(slots))))
    wanted = (slots - hoist) | data.draw(st.sets(st.sampled_from(sorted(slots))))
    hoisted = hoist_weight_gradients(backward, keep=slots - hoist, hoist=hoist)
    parts, expected = run_in_parts(hoisted, inputs, wanted), run_graph(backward, inputs)
    assert all(same(parts[slot], expected[slot]) for slot in wanted)
    finished = [slot for leaf in hoisted.leaves for slot in leaf.slots]
    assert sorted([*hoisted.chain_slots, *finished]) == sorted(slots)
    assert set(finished) <= hoist
    leaves = sum(leaf.flops for leaf in hoisted.leaves if leaf.serves & wanted)
    assert slots == hoist or hoisted.chain.flops + leaves == flops_of(
        ancestors(gradients[slot] for slot in wanted)
    )


@pytest.mark.parametrize("recipe", DETERMINISTIC, ids=str)
def test_splitting_does_no_work_twice(recipe):
    backward = backward_of(capture_of(recipe))
    live = {slot for slot, gradient in enumerate(slots_of(backward)) if gradient is not None}
    hoisted = hoist_weight_gradients(backward, keep=set(), hoist=live)
    leaves = sum(leaf.flops for leaf in hoisted.leaves)
    assert leaves > 0
    assert hoisted.chain.flops + leaves == flops_of(backward.graph.nodes)
    bodies = leaf_nodes(backward.graph, set(), live)
    assert [leaf.flops for leaf in hoisted.leaves] == list(map(flops_of, bodies.values()))


def regression_backward(depth=3):
    joint = capture(Regression(depth), make_batch())
    return backward_of(joint), {name: slot for slot, name in enumerate(joint.slots) if name}


def test_matrix_products_of_weights_become_leaves_and_sums_of_biases_stay():
    backward, slot = regression_backward()
    hoisted = hoist_weight_gradients(backward, keep=set(), hoist=set(slot.values()))
    assert {leaf.slots for leaf in hoisted.leaves} == {(slot[f"layers.{i}.weight"],) for i in range(3)}
    assert set(hoisted.chain_slots) == {slot[f"layers.{i}.bias"] for i in range(3)}
    assert operators(hoisted.chain.module)[aten.mm.default] == 2  # dX of two layers
    assert all(operators(leaf.module)[aten.mm.default] == 1 for leaf in hoisted.leaves)


def test_slots_that_are_neither_kept_nor_hoisted_are_not_computed():
    backward, slot = regression_backward()
    hoisted = hoist_weight_gradients(backward, keep={slot["layers.2.bias"]}, hoist={slot["layers.2.weight"]})
    assert hoisted.chain_slots == (slot["layers.2.bias"],)
    assert [leaf.slots for leaf in hoisted.leaves] == [(slot["layers.2.weight"],)]
    assert operators(hoisted.chain.module)[aten.mm.default] == 0


def test_nothing_to_hoist_leaves_the_backward_whole():
    backward, slot = regression_backward()
    live = set(slot.values())
    hoisted = hoist_weight_gradients(backward, keep=live, hoist=set())
    assert hoisted.leaves == ()
    assert operators(hoisted.chain.module) == operators(backward)


def test_norm_weights_stay_in_the_chain():
    joint = capture_of(POOL[0])
    backward = backward_of(joint)
    norms = {slot for slot, name in enumerate(joint.slots) if name and ".norm." in name}
    assert norms
    assert hoist_weight_gradients(backward, keep=set(), hoist=norms).leaves == ()


def test_an_embeddings_scatter_becomes_a_leaf():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 4)
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, tokens):
            return self.head(self.table(tokens) + self.shift).square().mean()

    joint = capture(Embedded(), {"tokens": torch.arange(6)})
    table, shift = joint.slots.index("table.weight"), joint.slots.index("shift")
    (leaf,) = hoist_weight_gradients(backward_of(joint), keep={shift}, hoist={table}).leaves
    assert operators(leaf.module)[aten.embedding_dense_backward.default] == 1
    assert leaf.flops == 0


def test_both_products_of_a_tied_weight_and_the_way_between_them_are_one_leaf():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return torch.tanh(torch.tanh(x @ self.weight) @ self.weight).square().mean()

    joint = capture(Tied(), {"x": torch.randn(3, 4)})
    slot = joint.slots.index("weight")
    (leaf,) = hoist_weight_gradients(backward_of(joint), keep=set(), hoist={slot}).leaves
    assert operators(leaf.module)[aten.mm.default] == 3


def test_a_gradient_that_others_read_is_not_hoisted():
    graph = fx.Graph()
    dy, w, x = (graph.placeholder(name) for name in ("dy", "w", "x"))
    for node in (dy, w, x):
        node.meta["val"] = torch.zeros(4, 4)
    shared = graph.call_function(aten.mm.default, (dy, w))
    further = graph.call_function(aten.mm.default, (shared, x))
    for node in (shared, further):
        node.meta["val"] = torch.zeros(4, 4)
    graph.output((shared, further, further))
    backward = fx.GraphModule({}, graph)
    hoisted = hoist_weight_gradients(backward, keep=set(), hoist={0, 1, 2})
    assert hoisted.leaves == ()
    inputs = [torch.randn(4, 4) for _ in range(3)]
    assert run_in_parts(hoisted, inputs, set()).keys() == {0, 1, 2}


class Reader(nn.Module):
    """Attention in single products over keys and values of a memory."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.memory = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        scores = torch.softmax(x @ self.query @ (self.memory @ self.key).t(), -1)
        return (scores @ (self.memory @ self.value)).square().mean()


def test_what_gradients_share_and_the_chain_does_not_need_is_a_leaf_before_theirs():
    joint = capture(Reader(), {"x": torch.randn(3, 4)})
    backward = backward_of(joint)
    query, key, value, memory = map(joint.slots.index, ("query", "key", "value", "memory"))
    hoisted = hoist_weight_gradients(backward, keep={query}, hoist={key, value, memory})
    products = {leaf.serves: operators(leaf.module)[aten.mm.default] for leaf in hoisted.leaves}
    assert products == {
        frozenset({key, memory}): 1,
        frozenset({value, memory}): 1,
        frozenset({key}): 1,
        frozenset({value}): 1,
        frozenset({memory}): 2,
    }
    assert operators(hoisted.chain.module)[aten.mm.default] == 3
    inputs = random_inputs(backward)
    expected = run_graph(backward, inputs)
    for live in ({query}, {query, key}, {query, key, value, memory}):
        parts = run_in_parts(hoisted, inputs, live)
        assert parts.keys() == live
        assert all(same(parts[slot], expected[slot]) for slot in live)


def test_leaves_take_their_operands_from_saved_values_and_from_the_chain():
    backward, slot = regression_backward(2)
    hoisted = hoist_weight_gradients(backward, keep=set(), hoist=set(slot.values()))
    inputs = backward.graph.find_nodes(op="placeholder")
    for leaf in hoisted.leaves:
        placeholders = leaf.module.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(leaf.operands)
        for node, operand in zip(placeholders, leaf.operands, strict=True):
            assert not operand.saved or inputs[operand.index].name == node.name


def test_a_part_takes_the_inputs_it_reads_and_no_others():
    backward, _ = regression_backward()
    gradients = slots_of(backward)
    last = next(g for g in gradients if g is not None)
    part = extract(backward, [last, None])
    read = ancestors([last])
    placeholders = backward.graph.find_nodes(op="placeholder")
    assert part.inputs == tuple(i for i, node in enumerate(placeholders) if node in read)
    assert part.flops == flops_of(read)
    inputs = random_inputs(backward)
    outputs = run_graph(part.module, [inputs[i] for i in part.inputs])
    assert torch.equal(outputs[0], run_graph(backward, inputs)[gradients.index(last)])
    assert outputs[1] is None


@pytest.mark.parametrize("recipe", DETERMINISTIC[:3], ids=str)
def test_the_given_backward_is_untouched(recipe):
    backward = backward_of(capture_of(recipe))
    before = text_of(backward)
    live = {slot for slot, gradient in enumerate(slots_of(backward)) if gradient is not None}
    hoist_weight_gradients(backward, keep=set(), hoist=live)
    extract(backward, slots_of(backward))
    assert text_of(backward) == before


def test_splitting_twice_gives_the_same_parts():
    backward = backward_of(capture_of(Recipe(("norm",))))
    live = {slot for slot, gradient in enumerate(slots_of(backward)) if gradient is not None}
    first, again = (hoist_weight_gradients(backward, keep=set(), hoist=live) for _ in range(2))
    assert text_of(first.chain.module) == text_of(again.chain.module)
    assert [leaf.operands for leaf in first.leaves] == [leaf.operands for leaf in again.leaves]


def test_a_split_prints_its_sizes():
    backward, slot = regression_backward(2)
    hoisted = hoist_weight_gradients(backward, keep=set(), hoist=set(slot.values()))
    nodes = len(hoisted.chain.module.graph.nodes)
    assert str(hoisted) == f"chain of {nodes} nodes with 2 slots, 2 leaves"
