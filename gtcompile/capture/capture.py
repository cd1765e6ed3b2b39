"""Capture a model and one batch as a joint graph: on fake tensors, with nothing in the model changed."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import fx, nn

from gtcompile.capture.forced_gradients import ZERO, forget_zero
from gtcompile.capture.model_io import (
    check_batch,
    list_parameters,
    loss_of,
    refuse_subclasses,
    runs_as_one_region,
    tensors_of,
    unwrap,
)
from gtcompile.capture.pristine_model import as_written, compiled_blocks, off_meta
from gtcompile.capture.rng import random_state, restore_random_state
from gtcompile.capture.strategies import BY_DYNAMO, routes, with_values
from gtcompile.errors import CaptureError
from gtcompile.graph.flops import has_flops
from gtcompile.graph.joint_graph import (
    ASKED,
    JointGraph,
    Parameter,
    ancestors,
    names_of,
    verify,
)
from gtcompile.passes.effect_tokens import without_effect_tokens
from gtcompile.torch_internals import (
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    TangentAOTInput,
    aot_export_joint_with_descriptors,
    has_free_unbacked_symbols,
    merge_equal_nodes,
)

logger = logging.getLogger(__name__)


class LossModule(nn.Module):
    """A model whose loss alone is differentiated, so that the joint graph has one tangent."""

    def __init__(self, model: nn.Module, returned_inside: list[Any], **settings: Any) -> None:
        super().__init__()
        self.model, self.returned_inside, self.settings = model, returned_inside, settings

    def forward(self, **batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The scalar loss of one batch, and copies of all else that it and modules inside it return."""
        self.returned_inside.clear()
        output = self.model(**batch, **self.settings)
        beside = tensors_of([output, self.returned_inside])
        return loss_of(output), [tensor.detach().clone() for tensor in beside]


def capture(model: nn.Module, example_inputs: Mapping[str, Any]) -> JointGraph:
    """Capture the model's loss and all its gradients on one batch as a joint graph.

    Dynamo captures the forward, as `torch.compile` would; where it meets a graph break, without the cache for
    generation that the model may fill. Else the forward is run on fake tensors and traced operator by
    operator. Where that meets a branch on data, or an operator without a fake kernel, it is run on copies of
    the weights and the batch: what is captured then is the way that this batch takes.

    What a model compiled as a whole computes twice from the same is in the graph once, as it will be run.

    Args:
        model: returns its scalar loss or an output with `.loss`; its parameters may be on the meta device.
        example_inputs: keyword dictionary of one batch, ordinary tensors, labels included.

    Raises:
        CaptureError: when no way succeeds, or nothing is trainable.
    """
    merged = runs_as_one_region(model)
    model = unwrap(model)
    check_batch(model, example_inputs)
    parameters = list_parameters(model)
    if not any(parameter.status == "selectable" for parameter in parameters):
        raise CaptureError(
            f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train"
        )
    model = off_meta(model, example_inputs)
    failures = []
    for route in routes(model, example_inputs):
        try:
            with _returned_beside(model) as inside, contextlib.ExitStack() as stack:
                stack.callback(restore_random_state, random_state())
                stack.enter_context(as_written(model, example_inputs))
                refuse_subclasses((*model.parameters(), *model.buffers(), *tensors_of(example_inputs)))
                narrowed = functools.partial(LossModule, model, inside)
                module, source = route(narrowed, dict(example_inputs), stack)
                joint = aot_export_joint_with_descriptors(stack, module, (), dict(example_inputs))
            _refuse_unknown_sizes(joint.graph_module)
            if merged and source == BY_DYNAMO:
                joint.graph_module.graph = _merged(joint.graph_module.graph)
            return _whole_model(joint.graph_module, parameters, source)
        except CaptureError:
            raise
        except Exception as error:  # torch raises many types; each is reported if all ways fail
            failures.append((route, error))
            logger.info("capture %s failed: %s", route.__doc__, error)
    without_values = failures[-1][0] is not with_values
    raise CaptureError(_explain(model, failures), without_values=without_values) from failures[0][1]


def _merged(graph: fx.Graph) -> fx.Graph:
    """The graph as the partitioner of a model compiled as a whole will have it."""
    descriptors = graph.output_node().meta["desc"]
    outputs: Sequence[Any] = graph.output_node().args[0]  # type: ignore[assignment]
    gradients = outputs[count_forward_outputs(descriptors) :]
    return merge_equal_nodes(graph, ancestors([g for g in gradients if isinstance(g, fx.Node)]))


def _explain(model: nn.Module, failures: list[tuple[Any, Exception]]) -> str:
    lines = [f"could not capture {type(model).__name__} as one graph"]
    for route, error in failures:
        first_line = str(error).strip().partition("\n")[0]
        lines.append(f"  {route.__doc__} {type(error).__name__}: {first_line}")
    lines.append("Usually a branch on data or an operator without a fake kernel explains it.")
    if failures[-1][0] is not with_values:
        lines.append("Real weights, neither sharded nor on the meta device, would do: then it can be run.")
    return "\n".join(lines)


class UnknownSizeError(Exception):
    """A tensor's size is known at run time only."""


def _refuse_unknown_sizes(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if has_free_unbacked_symbols(tensors_of(node.meta.get("val"))):
            raise UnknownSizeError(f"the size of {node.name} ({node.target}) depends on data")


@contextlib.contextmanager
def _returned_beside(model: nn.Module) -> Iterator[list[Any]]:
    """A list to which compiled blocks, and the modules that run eagerly around them, add what they return.

    They compute it even where somebody drops it. Empty for a model without compiled blocks: compiled as a
    whole, it computes what it returns itself.
    """
    returned: list[Any] = []
    blocks = compiled_blocks(model)
    inside = {module for block in blocks for module in block.modules() if module is not block}
    watched = [module for module in model.modules() if module not in inside] if blocks else []
    handles = [
        module.register_forward_hook(lambda _m, _i, output: returned.append(output)) for module in watched
    ]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()


def _whole_model(module: fx.GraphModule, parameters: tuple[Parameter, ...], source: str) -> JointGraph:
    canonical = names_of(parameters) | {ZERO: ASKED}
    without_effect_tokens(module)
    descriptors = module.graph.output_node().meta["desc"]
    forward_outputs = count_forward_outputs(descriptors)
    slots = tuple(
        canonical[desc.grad_of.target.removeprefix("model.")]
        if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, ParamAOTInput)
        else None
        for desc in descriptors[forward_outputs:]
    )
    for zero in [node for node in module.graph.find_nodes(op="placeholder") if _is_zero(node)]:
        forget_zero(zero)
    joint = JointGraph(module=module, forward_outputs=forward_outputs, slots=slots, source=source)
    joint = _keep_costly_outputs(joint)
    verify(joint)
    return dataclasses.replace(joint, parameters=tuple(_mark_unused(p, joint.live) for p in parameters))


def _is_zero(placeholder: fx.Node) -> bool:
    """Whether this is what was added to the activations that ask for a gradient."""
    meaning = placeholder.meta.get("desc")
    return isinstance(meaning, ParamAOTInput) and meaning.target == ZERO


def _keep_costly_outputs(joint: JointGraph) -> JointGraph:
    """Put the loss first, and drop all beside it but what takes FLOPs that the loss does not need.

    What a forward writes to its inputs comes before the loss in what AOTAutograd traces. Changes the graph in
    place, for nobody has seen it yet.
    """
    graph, output = joint.module.graph, joint.module.graph.output_node()
    descriptors = output.meta["desc"]
    first = next(i for i, desc in enumerate(descriptors) if not isinstance(desc, InputMutationAOTOutput))
    outputs = _moved_to_front(joint.outputs, first)
    loss, *beside = outputs[: joint.forward_outputs]
    of_loss = ancestors([loss])
    costly = [any(map(has_flops, ancestors([node]) - of_loss)) if node else False for node in beside]
    kept = [True, *costly, *(True for _ in joint.gradients)]
    output.args = (tuple(itertools.compress(outputs, kept)),)
    output.meta["desc"] = list(itertools.compress(_moved_to_front(descriptors, first), kept))
    graph.eliminate_dead_code()
    return dataclasses.replace(joint, module=_renumbered(joint.module), forward_outputs=1 + sum(costly))


def _moved_to_front(values: Sequence[Any], place: int) -> list[Any]:
    return [values[place], *values[:place], *values[place + 1 :]]


def _renumbered(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with its names numbered without gaps: then a node has one name in all reports."""
    graph = fx.Graph(tracer_cls=module.graph._tracer_cls)
    twin: dict[fx.Node, fx.Node] = {}
    inputs: Counter[str] = Counter()
    for node in module.graph.nodes:
        name = re.sub(r"_\d+$", "", node.name)
        if node.op == "placeholder":
            inputs[name] += 1
            name = f"{name}_{inputs[name]}"
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), twin.__getitem__)
        twin[node] = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        twin[node].meta = node.meta
    renumbered = fx.GraphModule(module, graph)
    renumbered.meta = module.meta
    return renumbered


def _mark_unused(parameter: Parameter, live: frozenset[str]) -> Parameter:
    if parameter.status == "selectable" and parameter.fqn not in live:
        return dataclasses.replace(parameter, status="unused")
    return parameter


def count_forward_outputs(descriptors: Sequence[object]) -> int:
    """How many leading outputs of a joint graph belong to the forward; the rest are gradient slots."""
    forward = takewhile(lambda desc: desc is not None and not isinstance(desc, GradAOTOutput), descriptors)
    return sum(1 for _ in forward)


def tangents(joint: JointGraph) -> tuple[fx.Node, ...]:
    """The placeholders that seed the backward."""
    placeholders = joint.module.graph.find_nodes(op="placeholder")
    return tuple(node for node in placeholders if isinstance(node.meta.get("desc"), TangentAOTInput))
