"""Every pass on a small graph: it fires, keeps numerics, once is enough, and its input is untouched."""

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import PlainAOTOutput
from torch.fx.experimental.proxy_tensor import make_fx

import gtcompile.passes
from gtcompile.passes import onednn_products
from gtcompile.passes.added_zero import forget_added_zero
from gtcompile.passes.common_subexpressions import eliminate_common_subexpressions
from gtcompile.passes.costly_outputs import keep_costly_outputs
from gtcompile.passes.dead_nodes import eliminate_dead_nodes
from gtcompile.passes.free_strides import free_strides
from gtcompile.passes.node_names import renumber_names
from gtcompile.passes.onednn_products import use_onednn_products
from gtcompile.passes.output_masks import narrow_output_masks
from gtcompile.passes.random_draws import save_random_draws
from gtcompile.passes.split_convolutions import split_convolutions
from gtcompile.passes.writable_outputs import keep_outputs_writable
from gtcompile.passes.zero_tangents import without_zero_tangents
from gtcompile.torch_internals import (
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    TangentAOTInput,
)
from tests.support.graphs import run_graph, text_of

aten = torch.ops.aten
LOSS, LOGITS, PRODUCT = (PlainAOTOutput(i) for i in range(3))
WEIGHT, ZERO = ParamAOTInput("weight"), ParamAOTInput("zero")
BUFFER = PlainAOTInput(0)
TESTED_ELSEWHERE = {
    *("drop_gradients", "differentiate_loss_only", "hoist_weight_gradients", "extract"),
    *("drop_effect_tokens", "drop_unneeded_checks"),
}
"""Passes on other kinds of graphs, which have test files of their own."""


@dataclass(frozen=True)
class Case:
    """A pass, and a function of tensors on whose graph it does something."""

    run: Callable[[fx.GraphModule], fx.GraphModule]
    function: Callable[..., tuple[Any, ...]]
    inputs: tuple[Any, ...]
    """Descriptors of the function's arguments, or as many Nones."""
    outputs: tuple[Any, ...] = ()
    """Descriptors of its results."""
    shape: tuple[int, ...] = (4, 4)
    kept_inputs: Sequence[int] = ()
    """Where the pass removes inputs: positions of those that it keeps."""
    kept_outputs: Sequence[int] = ()
    """Where the pass moves or drops outputs: the positions that they had."""
    zero_inputs: Sequence[int] = ()
    """Positions of arguments that must be zero."""
    dropped: int = 0
    """How many of the function's results are outputs no more, so that their nodes are dead."""

    def graph(self) -> fx.GraphModule:
        """The graph of the function, with descriptors."""
        values = [torch.randn(self.shape) for _ in self.inputs]
        module = make_fx(self.function, tracing_mode="fake")(*values)
        for node, meaning in zip(module.graph.find_nodes(op="placeholder"), self.inputs, strict=True):
            node.meta["desc"] = meaning
        module.graph.eliminate_dead_code()
        output = module.graph.output_node()
        output.meta["desc"] = list(self.outputs)
        output.args = (tuple(output.args[0])[: len(output.args[0]) - self.dropped],)
        return module

    def values(self) -> list[torch.Tensor]:
        """Values of its arguments."""
        torch.manual_seed(0)
        values = [torch.randn(self.shape) for _ in self.inputs]
        return [v * (i not in self.zero_inputs) for i, v in enumerate(values)]


def convolution(mask: Sequence[bool]) -> Callable[..., tuple[Any, ...]]:
    def backward(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[Any, ...]:
        gradients = aten.convolution_backward(
            dy, x, w, [4], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, list(mask)
        )
        return tuple(gradients[:2])

    return backward


def with_mutation_and_logits(new: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> tuple[Any, ...]:
    logits = new @ w
    return new * 2, logits.sum(), logits * 3, new @ new, dy @ w


CASES = {
    "eliminate_dead_nodes": Case(eliminate_dead_nodes, lambda x: (x.sin(), x.cos() @ x), (None,), dropped=1),
    "narrow_output_masks": Case(
        narrow_output_masks, convolution([True, True, True]), (None,) * 3, shape=(2, 2, 3, 3)
    ),
    "split_convolutions": Case(
        split_convolutions, convolution([True, True, False]), (None,) * 3, shape=(2, 2, 3, 3)
    ),
    "without_zero_tangents": Case(
        lambda graph: without_zero_tangents(graph, (1, 2), {2}),
        lambda w, dy, ds: (dy @ w + ds @ w, torch.cat([dy, ds])),
        (None,) * 3,
        zero_inputs=(2,),
    ),
    "keep_outputs_writable": Case(
        keep_outputs_writable, lambda x: (aten._unsafe_view(x.sin(), [8, 2]), x), (None,)
    ),
    "free_strides": Case(
        free_strides, lambda x: (aten.view(x, [2, 8]), aten._unsafe_view(x.sin(), [8, 2])), (None,)
    ),
    "save_random_draws": Case(save_random_draws, lambda x: (torch.bernoulli(x.sigmoid()),), (None,)),
    "use_onednn_products": Case(use_onednn_products, lambda x, y: (x @ y,), (None, None)),
    "renumber_names": Case(
        renumber_names, lambda x, y: (x.sin(), x.cos().sin() + y)[1:], (WEIGHT, BUFFER), (LOSS,)
    ),
    "forget_added_zero": Case(
        lambda graph: forget_added_zero(graph, "zero"),
        lambda w, zero, dy: ((w + zero).sum(), dy * w, dy * 2),
        (WEIGHT, ZERO, TangentAOTInput(LOSS)),
        (LOSS, GradAOTOutput(WEIGHT), GradAOTOutput(ZERO)),
        kept_inputs=(0, 2),
        zero_inputs=(1,),
    ),
    "eliminate_common_subexpressions": Case(
        eliminate_common_subexpressions,
        lambda w, dy: (w.sin().sum(), w.cos() * dy + dy * w.cos().cos() + w.cos()),
        (WEIGHT, TangentAOTInput(LOSS)),
        (LOSS, GradAOTOutput(WEIGHT)),
    ),
    "keep_costly_outputs": Case(
        keep_costly_outputs,
        with_mutation_and_logits,
        (BUFFER, WEIGHT, TangentAOTInput(LOSS)),
        (InputMutationAOTOutput(BUFFER), LOSS, LOGITS, PRODUCT, GradAOTOutput(WEIGHT)),
        kept_outputs=(1, 3, 4),
    ),
}


@pytest.fixture(autouse=True)
def onednn_for_all_products(monkeypatch):
    monkeypatch.setattr(onednn_products, "onednn_is_faster", torch.backends.mkldnn.is_available)
    monkeypatch.setattr(onednn_products, "LEAST_FLOPS", 0)


def description(module: fx.GraphModule) -> tuple[str, list[Any]]:
    """All that a pass may change: nodes, and marks on them."""
    return text_of(module), [node.meta.get("recompute") for node in module.graph.nodes]


def run_seeded(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[Any]:
    torch.manual_seed(1)
    return run_graph(module, inputs)


@pytest.mark.parametrize("name", CASES)
def test_it_fires_and_leaves_the_given_graph_alone(name):
    given = CASES[name].graph()
    before = description(given)
    after = CASES[name].run(given)
    assert description(after) != before
    assert description(given) == before


@pytest.mark.parametrize("name", CASES)
def test_values_stay_the_same(name):
    case = CASES[name]
    given, values = case.graph(), case.values()
    expected = run_seeded(given, values)
    kept = case.kept_inputs or range(len(values))
    computed = run_seeded(case.run(given), [values[i] for i in kept])
    for ours, position in zip(computed, case.kept_outputs or range(len(expected)), strict=True):
        assert ours is expected[position] is None or torch.allclose(ours, expected[position])


@pytest.mark.parametrize("name", CASES)
def test_once_is_enough(name):
    once = CASES[name].run(CASES[name].graph())
    assert description(CASES[name].run(once)) == description(once)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_without_such_nodes_is_left_alone(name):
    case = CASES[name]
    graph = Case(
        case.run,
        lambda *inputs: (inputs[0].sin().sum(), *(x.exp() for x in inputs[:1])),
        case.inputs,
        (LOSS, GradAOTOutput(WEIGHT)),
    ).graph()
    after = case.run(graph)
    calls = [[node.target for node in g.graph.nodes if node.op == "call_function"] for g in (graph, after)]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.outputs])
def test_shared_users_keep_what_they_read(name):
    """Every result has another reader besides the output."""

    def shared(*inputs: torch.Tensor) -> tuple[Any, ...]:
        results = CASES[name].function(*inputs)
        return (*(2 * result for result in results), *results)

    case = dataclasses.replace(CASES[name], function=shared)
    values = case.values()
    expected, computed = run_seeded(case.graph(), values), run_seeded(case.run(case.graph()), values)
    assert all(map(torch.allclose, computed, expected))


def decorated() -> dict[str, str]:
    """From the names of all passes to their docstrings, read off the source."""
    found = {}
    for module in pkgutil.iter_modules(gtcompile.passes.__path__):
        source = importlib.import_module(f"gtcompile.passes.{module.name}").__file__
        with open(str(source)) as file:
            tree = ast.parse(file.read())
        for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
            names = {ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list}
            if names & {"graph_pass", "interface_pass", "graph_split"}:
                found[function.name] = ast.get_docstring(function) or ""
    return found


def test_every_pass_is_tested_here_or_has_a_file_of_its_own():
    assert decorated().keys() == CASES.keys() | TESTED_ELSEWHERE


@pytest.mark.parametrize("name", decorated())
def test_every_pass_says_what_it_does_and_why_it_is_sound(name):
    docstring = decorated()[name]
    assert all(part in docstring for part in ("Before:", "After", "Sound "))
