"""Parts of a backward run from prepared calls: the bits of the graph, and nothing computed or kept beside."""

import weakref
from operator import getitem

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from gtcompile.compiler.operator_program import FUNCTIONS, OperatorProgram
from gtcompile.graph.flops import count_flops
from gtcompile.passes.hoisting import Part, extract
from gtcompile.passes.output_masks import narrow_output_masks
from tests.support.graphs import backward_of, capture_of, random_inputs, run_graph
from tests.support.models import POOL, RANDOM_LAYERS, Recipe

aten, prims = torch.ops.aten, torch.ops.prims
DETERMINISTIC = [recipe for recipe in POOL if RANDOM_LAYERS.isdisjoint(recipe.layers)]


def gradients_of(backward: fx.GraphModule) -> list[fx.Node | None]:
    return list(backward.graph.output_node().args[0])


def graph_of(build) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(tuple(build(graph)))
    return fx.GraphModule({}, graph)


@settings(max_examples=15)
@given(st.sampled_from(DETERMINISTIC), st.data())
def test_an_excerpt_computes_what_the_graph_does_from_the_inputs_it_needs(recipe, data):
    backward = backward_of(capture_of(recipe))
    inputs, gradients = random_inputs(backward), gradients_of(backward)
    live = {slot for slot, gradient in enumerate(gradients) if gradient is not None}
    chosen = data.draw(st.sets(st.sampled_from(sorted(live))))
    excerpt = OperatorProgram(backward).excerpt(chosen)
    part = extract(backward, [node if slot in chosen else None for slot, node in enumerate(gradients)])
    part = Part(narrow_output_masks(part.module), part.inputs)
    assert excerpt.inputs == part.inputs
    computed = excerpt.run([inputs[i] for i in excerpt.inputs])
    for slot, (ours, whole) in enumerate(zip(computed, run_graph(backward, inputs), strict=True)):
        assert ours is None if slot not in chosen else torch.equal(ours, whole)
    with count_flops() as counter:
        excerpt.run([inputs[i] for i in excerpt.inputs])
    assert counter.get_total_flops() == part.flops


def test_one_program_serves_many_parts_and_leaves_the_graph_alone():
    backward = backward_of(capture_of(Recipe(("norm", "residual"))))
    text, inputs = str(backward.graph), random_inputs(backward)
    program, whole = OperatorProgram(backward), run_graph(backward, inputs)
    live = [slot for slot, gradient in enumerate(gradients_of(backward)) if gradient is not None]
    for slot in live + live[::-1]:
        excerpt = program.excerpt([slot])
        assert torch.equal(excerpt.run([inputs[i] for i in excerpt.inputs])[slot], whole[slot])
    assert str(backward.graph) == text


def test_values_and_inputs_go_after_their_last_use():
    alive = []

    def note(x: torch.Tensor) -> torch.Tensor:
        alive.append([reference() is not None for reference in references])
        result = x + 1
        references.append(weakref.ref(result))
        return result

    def build(graph):
        x = graph.placeholder("x")
        for _ in range(4):
            x = graph.call_function(note, (x,))
        return [x]

    given = torch.ones(2)
    references = [weakref.ref(given)]
    inputs = [given]
    del given
    (result,) = OperatorProgram(graph_of(build)).excerpt([0]).run(inputs)
    assert inputs == []
    assert alive == [[True], [False, True], [False, False, True], [False, False, False, True]]
    assert torch.equal(result, torch.full((2,), 5.0))


@pytest.mark.parametrize(("chosen", "mask"), [([0], [True, False, False]), ([1, 2], [False, True, True])])
def test_operators_are_asked_for_the_outputs_that_are_read(chosen, mask):
    masks = []
    operator = aten.native_layer_norm_backward.default

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is operator:
                masks.append(list(args[-1]))
            return function(*args, **(kwargs or {}))

    def build(graph):
        dy, x, mean, deviation, weight, bias = map(graph.placeholder, ("dy", "x", "m", "s", "w", "b"))
        arguments = (dy, x, [4], mean, deviation, weight, bias, [True, True, True])
        result = graph.call_function(operator, arguments)
        return [graph.call_function(getitem, (result, i)) for i in range(3)]

    x, small, row = torch.randn(3, 4), torch.ones(3, 1), torch.ones(4)
    with Recorder():
        results = OperatorProgram(graph_of(build)).excerpt(chosen).run([x, x, small, small, row, row])
    assert masks == [mask]
    assert [value is not None for value in results] == mask


def test_arguments_may_hold_values_in_lists_slices_and_keywords():
    def build(graph):
        x, n = graph.placeholder("x"), graph.placeholder("n")
        joined = graph.call_function(torch.cat, ([x, x],), {"dim": 0})
        part = graph.call_function(lambda value, index: value[index], (joined, (slice(None, n), 0)))
        return [graph.call_function(torch.mul, (), {"input": part, "other": 2}), n]

    excerpt = OperatorProgram(graph_of(build)).excerpt([0, 1])
    doubled, n = excerpt.run([torch.arange(4.0).reshape(2, 2), 3])
    assert doubled.tolist() == [0.0, 4.0, 0.0]
    assert n == 3


def test_constants_of_the_graph_are_found():
    graph = fx.Graph()
    graph.output((graph.call_function(torch.add, (graph.get_attr("inner.two"), graph.placeholder("x"))),))
    inner = torch.nn.Module()
    inner.two = torch.tensor(2.0)
    module = fx.GraphModule({"inner.two": inner.two}, graph)
    assert OperatorProgram(module).excerpt([0]).run([torch.tensor(1.0)])[0].item() == 3


ARGUMENTS = {
    aten.view.default: (torch.randn(2, 6), [3, 4]),
    aten.reshape.default: (torch.randn(2, 6).t(), [3, 4]),
    aten.mm.default: (torch.randn(2, 3), torch.randn(3, 4)),
    aten.bmm.default: (torch.randn(2, 2, 3), torch.randn(2, 3, 4)),
    aten.permute.default: (torch.randn(2, 3, 4), [2, 0, 1]),
    aten.t.default: (torch.randn(2, 3),),
    aten.transpose.int: (torch.randn(2, 3, 4), 1, 2),
    aten.sum.dim_IntList: (torch.randn(2, 3, 4), [0, 1], True),
    prims.convert_element_type.default: (torch.randn(2, 3).t(), torch.bfloat16),
}


@pytest.mark.parametrize("operator", FUNCTIONS, ids=str)
def test_a_function_does_the_same_as_the_operator_that_it_is_called_for(operator):
    given = ARGUMENTS[operator]
    expected, found = operator(*given), FUNCTIONS[operator](*given)
    assert torch.equal(found, expected)
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    is_view = expected.untyped_storage().data_ptr() == given[0].untyped_storage().data_ptr()
    assert (found.untyped_storage().data_ptr() == given[0].untyped_storage().data_ptr()) == is_view


def test_a_conversion_to_the_same_type_is_a_copy_as_by_the_operator():
    value = torch.ones(2)
    assert FUNCTIONS[prims.convert_element_type.default](value, torch.float32) is not value


def test_nothing_asked_for_reads_nothing():
    excerpt = OperatorProgram(graph_of(lambda graph: [graph.placeholder("x")])).excerpt([])
    assert excerpt.inputs == ()
    assert excerpt.run([]) == (None,)
