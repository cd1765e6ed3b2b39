"""A region at run time: each call computes the gradients of what is trained at that moment, no others."""

import logging
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx, nn

from gtcompile.capture.model_io import refuse_subclasses
from gtcompile.compiler.boundaries import boundary_copy, calibrating, end_backward, needs_gradient
from gtcompile.compiler.captured_region import CapturedRegion, captured_region
from gtcompile.compiler.hoisted import HoistedVariants, NoBackwardError
from gtcompile.compiler.inductor import compile_frozen
from gtcompile.compiler.options import CompileOptions
from gtcompile.compiler.partitioning import BackwardWritesError, ForwardGradientsError
from gtcompile.compiler.region_graph import (
    Histories,
    Live,
    histories,
    output_sources,
    pick,
    region_node,
)
from gtcompile.compiler.specialized import SpecializedVariants
from gtcompile.errors import GraphContractError
from gtcompile.state import trained_set
from gtcompile.torch_internals import BACKWARD_HOOKS, has_symbolic_numbers

logger = logging.getLogger(__name__)
LIVE_SETS_KEPT = 256
"""Sets of live gradients for which a region remembers where the backward ends; the oldest is forgotten."""
_hooks_of = operator.attrgetter(BACKWARD_HOOKS)


class Variants(Protocol):
    """The compiled code of a region for every set of live gradients; two kinds, hoisted and specialized."""

    def __call__(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run the region so that its backward computes the live gradients alone."""

    def prepare(self, live: Live) -> None:
        """Compile all code that these gradients need."""


class Chosen(NamedTuple):
    """What the trained set chooses among the inputs of one block."""

    live: Live
    """Positions of the inputs whose gradients are wanted."""
    frozen: tuple[int, ...]
    """Positions of the parameters that require grad for Dynamo's guards, and are frozen."""


NOTHING = Chosen(frozenset(), ())


class Region:
    """A captured graph that computes gradients for exactly the trained ones among its parameters.

    A region finds out which gradients are live, runs code without autograd where none is, and detaches
    outputs that depend on nothing trained. `HoistedVariants` or `SpecializedVariants` compile the rest.
    """

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions) -> None:
        refuse_subclasses(example_inputs)
        self._region = region = captured_region(graph, example_inputs, options)
        self._parameters_among = pick(region.parameters)
        self._output_sources = output_sources(region.graph)

        # Dispatch is on the path of every call, so two answers are kept:
        # What is live and what is frozen, by the parameters of the calling block, until the set changes.
        self._selection_of: dict[tuple[int, ...], Chosen] = {}
        self._generation = -1
        # The outputs that depend on nothing trained, by live gradients: the backward ends at these outputs.
        self._ends_of: dict[Live, tuple[int, ...]] = {}

        self._variants = make_variants(region)
        hoisted = options.variants == "hoisted"
        self._frozen = compile_frozen(region) if hoisted else None  # now, so that later sets compile nothing
        if has_symbolic_numbers(region.context.fake_mode):
            self._compile_now(example_inputs)

    def _compile_now(self, inputs: Sequence[Any]) -> None:
        """Compile for the current trained set, before the backend returns to Dynamo.

        Dynamo traces a Python number that changes as a symbol. If the graph branched on the number without
        computing with it, AOTAutograd makes Dynamo capture again with its value, which is possible only now.
        """
        if live := self._selection(inputs).live:
            self._variants.prepare(live)
        elif self._frozen is None:
            self._frozen = compile_frozen(self._region)

    def __call__(self, *inputs: Any) -> Any:
        """Run the region; the backward computes the gradients of what is trained now."""
        live, frozen = self._selection(inputs)
        if not live:
            return self._run_frozen(inputs)
        ends = self._ends_of.get(live)
        if ends is None:
            return self._check_new(live, inputs)
        outputs = self._variants(live, without_gradients(inputs, frozen))
        return detach(outputs, ends) if ends else outputs

    def _selection(self, inputs: Sequence[Any]) -> "Chosen":
        """What the trained set chooses among these inputs."""
        if not self._region.differentiable:
            return NOTHING
        if self._generation != trained_set.generation():
            self._selection_of.clear()
            self._generation = trained_set.generation()
        wanted = [i for i in self._region.activations if needs_gradient(inputs[i])]
        parameters = self._parameters_among(inputs)
        key = (*wanted, *map(id, parameters))
        found = self._selection_of.get(key)
        if found is None:
            found = self._selection_of[key] = self._select(inputs, wanted)
        return found

    def _select(self, inputs: Sequence[Any], wanted: Iterable[int]) -> "Chosen":
        positions = self._region.parameters
        trained_set.enter_region(self._parameters_among(inputs))
        live = frozenset(i for i in positions if trained_set.is_trained(inputs[i])).union(wanted)
        return Chosen(live, tuple(i for i in positions if i not in live and inputs[i].requires_grad))

    def _check_new(self, live: Live, inputs: Sequence[Any]) -> Any:
        """Run with a new set of live gradients; the backward checks that no other gradient comes out."""
        visible = self._without_hooks(inputs, live)
        before = histories(visible)
        outputs = self._variants(live, visible)
        expect_gradients(outputs, visible, before, live)
        return detach(outputs, self._remember_ends(live))

    def _run_frozen(self, inputs: Sequence[Any]) -> Any:
        """Run without autograd: nothing is trained in the region or before it."""
        if self._frozen is None:
            with self._region.compilation():
                self._frozen = compile_frozen(self._region)
        outputs = self._frozen(*inputs)
        if calibrating():  # outputs require grad where they would if everything were trained
            sources = zip(outputs, self._output_sources, strict=True)
            outputs = [
                boundary_copy(out) if self._could_require_grad(out, of) else out for out, of in sources
            ]
        return detach(outputs, range(len(outputs)))  # an input passed through may require grad

    def _could_require_grad(self, output: object, sources: Live) -> bool:
        """Whether an output requires grad when everything is trained."""
        differentiable = isinstance(output, torch.Tensor) and output.is_floating_point()
        return differentiable and not sources.isdisjoint(self._region.parameters + self._region.activations)

    def _without_hooks(self, inputs: Sequence[Any], live: Live) -> Sequence[Any]:
        """Replace frozen parameters that have hooks by aliases: autograd would call the hooks with None."""
        if not any(map(_hooks_of, self._parameters_among(inputs))):
            return inputs
        replaced = list(inputs)
        for i in (i for i in self._region.parameters if _hooks_of(inputs[i]) and i not in live):
            replaced[i] = inputs[i].detach().requires_grad_(inputs[i].requires_grad)
        return replaced

    def _remember_ends(self, live: Live) -> tuple[int, ...]:
        """Find the outputs that depend on nothing trained, where the backward ends."""
        if len(self._ends_of) == LIVE_SETS_KEPT:
            del self._ends_of[next(iter(self._ends_of))]
        sources = enumerate(self._output_sources)
        ends = self._ends_of[live] = tuple(i for i, positions in sources if positions.isdisjoint(live))
        return ends


def make_variants(region: CapturedRegion) -> Variants:
    """Make hoisted variants if the options say so and the region allows it, else specialized ones."""
    if region.options.variants == "hoisted" and region.differentiable:
        try:
            return HoistedVariants(region)
        except (NoBackwardError, BackwardWritesError):
            pass
        except ForwardGradientsError:
            logger.warning(
                "a part of the model has an operator that computes gradients in the forward, such as "
                "cross-entropy in chunks; this part is compiled anew for each trained set"
            )
    return SpecializedVariants(region)


def detach(outputs: Sequence[Any], positions: Iterable[int]) -> Sequence[Any]:
    """Return the outputs, with those at some positions detached from their history."""
    detached = list(outputs)
    for i in positions:
        if isinstance(outputs[i], torch.Tensor) and outputs[i].requires_grad:
            detached[i] = end_backward(outputs[i])
    return detached


def without_gradients(inputs: Sequence[Any], positions: Sequence[int]) -> Sequence[Any]:
    """Replace inputs by aliases that do not require grad: autograd neither visits them nor calls hooks."""
    if not positions:
        return inputs
    replaced = list(inputs)
    for i in positions:
        replaced[i] = inputs[i].detach()
    return replaced


def expect_gradients(outputs: Any, inputs: Sequence[Any], before: Histories, live: Live) -> None:
    """Make the next backward check, once, that it returns no gradient for a frozen parameter.

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
