"""Capture a model and one batch as a joint graph: on fake tensors, with nothing in the model changed."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from gtcompile.asked import ZERO, forget_zero
from gtcompile.errors import CaptureError
from gtcompile.flops import has_flops
from gtcompile.joint import ASKED, JointGraph, Parameter, ParameterStatus, ancestors, names_of, verify
from gtcompile.originals import as_written, compiled_blocks, off_meta
from gtcompile.random_states import random_state, restore_random_state
from gtcompile.routes import BY_DYNAMO, routes, with_values
from gtcompile.torch_internals import (
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    TangentAOTInput,
    aot_export_joint_with_descriptors,
    has_free_unbacked_symbols,
    is_traceable_wrapper_subclass,
    merge_equal_nodes,
)

logger = logging.getLogger(__name__)
RETURNED_DEPTH = 8
"""How deep tensors are looked for in what a model returns; a cache of caches of layers takes six."""


def loss_of(output: Any) -> torch.Tensor:
    """The scalar loss in what a model returned: itself, `.loss`, `["loss"]`, or the first of a tuple.

    Raises:
        CaptureError: when there is none.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):  # where transformers' Trainer takes it
        loss = output[0] if output else None
    elif not isinstance(output, torch.Tensor):
        loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = (
            f"a tensor of shape {list(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else type(output).__name__
        )
        raise CaptureError(
            f"expected the model to return its loss (a scalar, first in a tuple or as .loss), got {got}. "
            f"Does the batch contain labels?"
        )
    return loss.reshape(())


def tensors_of(output: Any, depth: int = RETURNED_DEPTH) -> list[torch.Tensor]:
    """Every tensor in what a model returned, in mappings, sequences and attributes of objects such as caches.

    Args:
        output: anything.
        depth: how deeply nested tensors are found, so that cycles end.
    """
    if isinstance(output, torch.Tensor):
        return [output]
    parts: list[Any] = []
    if depth and isinstance(output, Mapping):
        parts = list(output.values())
    elif depth and isinstance(output, (list, tuple)):
        parts = list(output)
    elif depth and hasattr(output, "__dict__") and not isinstance(output, (nn.Module, type)):
        parts = list(vars(output).values())
    return [tensor for part in parts for tensor in tensors_of(part, depth - 1)]


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


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers of `torch.compile` and `DistributedDataParallel`."""
    inner = without_replicas(getattr(without_replicas(model), "_orig_mod", without_replicas(model)))
    if not isinstance(inner, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")
    return inner


def runs_as_one_region(model: nn.Module) -> bool:
    """Whether the model is compiled as a whole."""
    outermost = without_replicas(model)
    return unwrap(model) is not outermost or outermost._compiled_call_impl is not None


def without_replicas(model: nn.Module) -> nn.Module:
    """The module that `DistributedDataParallel` wraps, compiled or not; any other model itself."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def check_batch(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Refuse a batch that `model.forward` cannot take, before any work.

    Raises:
        TypeError: when the batch is not a mapping from argument names.
        ValueError: when the model takes no argument of some name, or needs one that is not there.
    """
    if not isinstance(batch, Mapping) or not all(isinstance(key, str) for key in batch):
        raise TypeError(
            f"expected one batch as the keyword dictionary of the model's forward, got {type(batch).__name__}"
        )
    signature = inspect.signature(model.forward).parameters
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in signature.values())
    unknown = [key for key in batch if key not in signature and not takes_any]
    if unknown:
        raise ValueError(
            f"{type(model).__name__}.forward takes no {', '.join(map(repr, unknown))}; "
            f"it takes {', '.join(signature)}. Remove the extra keys from the batch."
        )
    missing = [name for name, p in signature.items() if _is_required(p) and name not in batch]
    if missing:
        raise ValueError(
            f"{type(model).__name__}.forward needs {', '.join(missing)}, which the batch lacks; "
            f"it has {', '.join(batch) or 'nothing'}. Add what is missing to the batch."
        )


def _is_required(argument: inspect.Parameter) -> bool:
    by_name = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    return by_name and argument.default is argument.empty


def refuse_subclasses(values: Iterable[object]) -> None:
    """Refuse tensors that are made of other tensors.

    Raises:
        CaptureError: naming the type of the first.
    """
    for value in values:
        if is_traceable_wrapper_subclass(value):
            raise CaptureError(
                f"expected plain tensors, got a {type(value).__name__} of shape {list(value.shape)}: a joint "
                f"graph sees the tensors that such a subclass is made of, not the one whose gradient is "
                f"asked for. Convert it to a plain tensor, or leave the modules that use it out of "
                f"compile_blocks(model, blocks=[...])."
            )


def list_parameters(model: nn.Module) -> tuple[Parameter, ...]:
    """Every parameter of the model in registration order, tied weights as one."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(fqn)
        tensors[id(parameter)] = parameter
    return tuple(_describe(tensors[key], fqns) for key, fqns in names.items())


def _describe(parameter: nn.Parameter, fqns: list[str]) -> Parameter:
    status: ParameterStatus = "selectable" if parameter.requires_grad else "frozen by user"
    shape = tuple(parameter.shape)
    return Parameter(fqn=fqns[0], aliases=tuple(fqns[1:]), shape=shape, dtype=parameter.dtype, status=status)


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
    output = graph.output_node()
    gradients = output.args[0][count_forward_outputs(output.meta["desc"]) :]  # type: ignore[index]
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
