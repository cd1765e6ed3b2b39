"""A region: one graph that Dynamo captured, dispatched at run time on what is trained."""

import contextlib
import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from gtcompile.capture.model_io import refuse_subclasses
from gtcompile.compiler.autograd_nodes import Histories, histories, places_among_gradients, region_node
from gtcompile.compiler.boundaries import boundary_copy, calibrating, end_backward, needs_gradient
from gtcompile.compiler.frozen import compile_frozen
from gtcompile.compiler.hoisted import HoistedVariants, NoBackwardError
from gtcompile.compiler.region_graph import Live, output_sources
from gtcompile.compiler.side_work import has_side_work
from gtcompile.compiler.specialized import SpecializedVariants
from gtcompile.errors import GraphContractError
from gtcompile.passes import onednn_products
from gtcompile.passes.loss_only import differentiate_loss_only
from gtcompile.state import trained_set
from gtcompile.torch_internals import FakeTensor, TracingContext, has_symbolic_numbers, tracing


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOptions:
    """How the regions of one compiled model are made."""

    compiler: Literal["inductor", "eager"] = "inductor"
    """`inductor` generates code; `eager` runs the rewritten graphs operator by operator, bit-equal to eager
    PyTorch."""
    variants: Literal["specialized", "hoisted"] = "specialized"
    """`specialized` compiles anew for each trained set; `hoisted` compiles once."""
    variants_kept: int = 16
    """How many specialized variants a region keeps; the least recently used is dropped."""
    cut_chains: Literal["run", "compile"] = "compile"
    """What a hoisted region does where the backward ends inside it: compile what is left, or run it operator
    by operator."""
    specialize: Literal["never", "beside"] = "never"
    """`beside`: another process compiles the backward of a hoisted region for sets that stay for some steps;
    from then on the way that is measured faster runs. Not worth it by default: see the README."""
    differentiate: Literal["everything", "loss"] = "everything"
    """`loss` when only scalar outputs are differentiated: no zero gradient for logits, nor its memory."""
    random: Literal["eager", "compiler"] = "eager"
    """Whose random numbers dropout draws. `eager`: the same as eager PyTorch, in every variant; `compiler`:
    Inductor's own, generated where they are used, which is faster."""
    activation_memory_budget: float = 1.0
    """Share, in [0, 1], of what would be saved for backward that may be; the backward computes the rest
    again, which costs FLOPs that `backward_costs` does not know of."""


LIVE_SETS_KEPT = 256
"""Sets of live gradients a region remembers to have checked; the oldest is forgotten."""
NOTHING: Live = frozenset()
_hooks_of = operator.attrgetter("_backward_hooks")


class Region:
    """A captured graph that computes gradients for exactly the trained ones among its parameters."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any], options: RegionOptions) -> None:
        refuse_subclasses(example_inputs)
        positions = range(len(example_inputs))
        self._parameters = [i for i in positions if isinstance(example_inputs[i], nn.Parameter)]
        tensors = [
            i for i in positions if isinstance(example_inputs[i], torch.Tensor) and i not in self._parameters
        ]
        self._parameters_among = pick(self._parameters)
        self._activations = [i for i in tensors if example_inputs[i].requires_grad]
        self._differentiable = torch.is_grad_enabled() and any(map(requires_grad, example_inputs))
        self._tracing_context = TracingContext.get()
        if options.differentiate == "loss":
            graph = differentiate_loss_only(graph)
        self._graph = graph
        self._example_inputs = _fake_inputs(graph, example_inputs)
        self._options = options
        self._output_sources = output_sources(graph)
        self._cut_positions: dict[Live, tuple[int, ...]] = {}
        self._lives: dict[tuple[int, ...], Live] = {}
        self._generation = -1
        self._variants = self._make_variants()
        hoisted = options.variants == "hoisted"
        self._frozen = self._compile_frozen() if hoisted else None  # so that later sets compile nothing
        self._side_work: bool | None = None if len(self._output_sources) > 1 else False
        if has_symbolic_numbers(self._tracing_context.fake_mode):
            self._compile_now(example_inputs)

    def _compile_now(self, inputs: Sequence[Any]) -> None:
        """Compile for what is trained while Dynamo still listens.

        A Python number that changes is a symbol to Dynamo. Where the graph computes nothing with it, having
        branched on it, AOTAutograd asks for another capture, with the number's value.
        """
        live = self._live(inputs) if self._differentiable else NOTHING
        if not live:
            self._frozen = self._compile_frozen()
        elif isinstance(self._variants, SpecializedVariants):
            self._variants.compile(live)

    def __call__(self, *inputs: Any) -> Any:
        """Run the variant for what is trained now among `inputs`."""
        live = self._live(inputs) if self._differentiable else NOTHING
        if not live:
            return self._run_frozen(inputs)
        visible = self._without_hooks(inputs, live)
        if self._side_work:
            self._leave_out_side_work()
        first = live not in self._cut_positions
        looking = self._side_work is None and isinstance(self._variants, SpecializedVariants)
        before = histories(visible) if first or looking else frozenset()
        outputs = self._variants(live, visible)
        if looking:
            self._look_for_side_work(outputs, before)
        if first:
            expect_gradients(outputs, visible, before, live)
            self._keep_cut_positions(live)
        return detach(outputs, self._cut_positions[live])

    def _look_for_side_work(self, outputs: Sequence[Any], before: Histories) -> None:
        """Have the coming backward note whether it sends zeros back through outputs nobody differentiates."""
        node = region_node(outputs, before)
        if node is None:
            return

        places = places_among_gradients(outputs, node)

        def note(gradients: Sequence[torch.Tensor | None]) -> None:
            if self._side_work is None:
                differentiated = {i for i, place in places.items() if gradients[place] is not None}
                self._side_work = has_side_work(self._graph, differentiated)

        node.register_prehook(note)

    def _leave_out_side_work(self) -> None:
        """Compile once more, as hoisted variants: they tell at every backward what nobody differentiates."""
        with self._compilation():
            self._variants = self._hoisted()
        self._side_work = False

    def _run_frozen(self, inputs: Sequence[Any]) -> Any:
        """Run where nothing is trained, here or before: without autograd."""
        if self._frozen is None:
            with self._compilation():
                self._frozen = self._compile_frozen()
        outputs = self._frozen(*inputs)
        if calibrating():  # as they would if anything were trained
            sources = zip(outputs, self._output_sources, strict=True)
            outputs = [
                boundary_copy(out) if self._could_ask(out, positions) else out for out, positions in sources
            ]
        return detach(outputs, range(len(outputs)))  # an input passed through may ask for a gradient

    def _could_ask(self, output: object, sources: Live) -> bool:
        """Whether an output asks for a gradient where everything is trained."""
        differentiable = isinstance(output, torch.Tensor) and output.is_floating_point()
        return differentiable and not sources.isdisjoint({*self._parameters, *self._activations})

    def _without_hooks(self, inputs: Sequence[Any], live: Live) -> Sequence[Any]:
        """The inputs, with stand-ins for frozen parameters with hooks, which autograd calls with None."""
        if not any(map(_hooks_of, self._parameters_among(inputs))):
            return inputs
        replaced = list(inputs)
        for i in (i for i in self._parameters if inputs[i]._backward_hooks and i not in live):
            replaced[i] = inputs[i].detach().requires_grad_(inputs[i].requires_grad)
        return replaced

    def _keep_cut_positions(self, live: Live) -> None:
        """Work out which outputs depend on nothing trained, here or before: the backward ends there."""
        if len(self._cut_positions) == LIVE_SETS_KEPT:
            del self._cut_positions[next(iter(self._cut_positions))]
        sources = enumerate(self._output_sources)
        self._cut_positions[live] = tuple(i for i, positions in sources if positions.isdisjoint(live))

    def _compile_frozen(self) -> Callable[..., Any]:
        return compile_frozen(
            self._graph, self._example_inputs, compiler=self._options.compiler, patches=self._patches
        )

    def _make_variants(self) -> HoistedVariants | SpecializedVariants:
        """Hoisted variants where they are asked for and there is a backward to split."""
        if self._options.variants == "hoisted" and self._differentiable:
            with contextlib.suppress(NoBackwardError):
                return self._hoisted()
        return self._specialized()

    def _specialized(self) -> SpecializedVariants:
        return SpecializedVariants(
            self._graph,
            self._example_inputs,
            compiler=self._options.compiler,
            patches=self._patches,
            kept=self._options.variants_kept,
            memory_budget=self._options.activation_memory_budget,
            compilation=self._compilation,
        )

    def _hoisted(self) -> HoistedVariants:
        return HoistedVariants(
            copy.copy(self._graph),
            self._example_inputs,
            compiler=self._options.compiler,
            patches=self._patches,
            cut_chains=self._options.cut_chains,
            memory_budget=self._options.activation_memory_budget,
            beside=self._options.specialize == "beside",
            parameters=frozenset(self._parameters),
        )

    @property
    def _patches(self) -> dict[str, Any]:
        """Of Inductor's settings."""
        return {"fallback_random": self._options.random == "eager", **onednn_products.inductor_settings()}

    def _live(self, inputs: Sequence[Any]) -> Live:
        """Positions of the inputs whose gradients are wanted."""
        if self._generation != trained_set.generation():
            self._lives.clear()
            self._generation = trained_set.generation()
        wanted = [i for i in self._activations if needs_gradient(inputs[i])]
        parameters = self._parameters_among(inputs)
        key = (*wanted, *map(id, parameters))
        live = self._lives.get(key)
        if live is None:
            trained_set.enter_region(parameters)
            live = frozenset(i for i in self._parameters if trained_set.is_trained(inputs[i])).union(wanted)
            self._lives[key] = live
        return live

    @contextlib.contextmanager
    def _compilation(self) -> Iterator[None]:
        """Dynamo's compilation of this graph, entered again for a new variant."""
        with tracing(self._tracing_context), torch.set_grad_enabled(self._differentiable):
            yield


def detach(outputs: Sequence[Any], positions: Iterable[int]) -> Sequence[Any]:
    """The outputs, those at some positions without their history."""
    detached = list(outputs)
    for i in positions:
        if isinstance(outputs[i], torch.Tensor) and outputs[i].requires_grad:
            detached[i] = end_backward(outputs[i])
    return detached


def pick(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that takes the values at some positions of a sequence, faster than a comprehension."""
    if len(positions) < 2:  # of which `itemgetter` makes no tuple
        return lambda values: [values[i] for i in positions]
    return operator.itemgetter(*positions)


def requires_grad(value: object) -> bool:
    """Whether an input is a tensor that asks for a gradient."""
    return isinstance(value, torch.Tensor) and value.requires_grad


def _fake_inputs(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """What Dynamo traced with: later variants are compiled when the first example inputs are long gone."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [
        _of_backend(node.meta.get("example_value", value))
        for node, value in zip(placeholders, example_inputs, strict=True)
    ]


def _of_backend(value: Any) -> Any:
    """A Python number that Dynamo made a tensor, with the symbol its `.item()` stands for.

    Backends trace in a fake mode of their own, and a fake tensor that is carried over forgets the symbol.
    """
    mode = TracingContext.get().fake_mode
    if mode is None or not isinstance(value, FakeTensor) or value.item_memo is None:
        return value
    carried = mode.from_tensor(value)
    carried.item_memo = value.item_memo
    return carried


def expect_gradients(outputs: Any, inputs: Sequence[Any], before: Histories, live: Live) -> None:
    """Have the coming backward check, once, that it hands out no gradient for a frozen parameter.

    Raises:
        GraphContractError: from the backward, naming the position of the parameter.
    """
    node = region_node(outputs, before)
    if node is None:
        return
    frozen = {
        id(value): i for i, value in enumerate(inputs) if isinstance(value, nn.Parameter) and i not in live
    }
    positions = [frozen.get(id(getattr(edge, "variable", None))) for edge, _ in node.next_functions]

    def check(gradients: Sequence[torch.Tensor | None], _: Sequence[torch.Tensor | None]) -> None:
        handle.remove()
        for position, gradient in zip(positions, gradients, strict=True):
            if position is not None and gradient is not None:
                raise GraphContractError(
                    f"the frozen parameter at input {position} of a region got a gradient"
                )

    handle = node.register_hook(check)
