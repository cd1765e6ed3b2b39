"""Capture a model and one batch as a joint graph, without changing the model."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from gtcompile.capture.batch_tree import split_batch
from gtcompile.capture.forced_gradients import ZERO
from gtcompile.capture.model_io import (
    LossFunction,
    check_batch,
    list_parameters,
    loss_of,
    refuse_compressed_sparse,
    refuse_subclasses,
    runs_as_one_region,
    scalar_loss,
    tensors_of,
    unwrap,
)
from gtcompile.capture.pristine_model import as_written, compiled_blocks, device_of, off_meta
from gtcompile.capture.rng import random_state, restore_random_state
from gtcompile.capture.strategies import DYNAMO, WITH_VALUES, Strategy, strategies
from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import (
    FORCED_GRADIENTS,
    JointGraph,
    Parameter,
    count_forward_outputs,
    names_of,
    verify,
)
from gtcompile.passes.added_zero import forget_added_zero
from gtcompile.passes.common_subexpressions import eliminate_common_subexpressions
from gtcompile.passes.costly_outputs import keep_costly_outputs
from gtcompile.passes.effect_tokens import drop_effect_tokens
from gtcompile.passes.node_names import renumber_names
from gtcompile.torch_internals import (
    GradAOTOutput,
    ParamAOTInput,
    aot_export_joint_with_descriptors,
    has_free_unbacked_symbols,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch as keyword arguments of a `LossModule`."""

    named: dict[str, Any]
    """The batch itself if the model returns its loss, else the tensors of the batch by invented names."""
    loss: Callable[[nn.Module, dict[str, Any]], tuple[torch.Tensor, Any]]
    """Takes the model and `named`; returns the scalar loss, and everything else that the model returned."""


class LossModule(nn.Module):
    """Wraps a model so that only the loss is differentiated: the joint graph has one tangent."""

    def __init__(self, model: nn.Module, inputs: Inputs, returned_inside: list[Any]) -> None:
        super().__init__()
        self.model, self.loss, self.returned_inside = model, inputs.loss, returned_inside

    def forward(self, **batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the scalar loss, and detached copies of all other tensors that the modules return."""
        self.returned_inside.clear()
        loss, output = self.loss(self.model, batch)
        others = tensors_of([output, self.returned_inside])
        return loss, [tensor.detach().clone() for tensor in others]


def capture(model: nn.Module, batch: Any, *, loss_fn: LossFunction | None = None) -> JointGraph:
    """Capture the loss of a model on one batch, and all its gradients, as a joint graph.

    Strategies are tried in this order. First, Dynamo captures the forward, as `torch.compile` would; after a
    graph break, it tries again without the cache that models fill for generation. Next, the forward runs on
    fake tensors and is traced operator by operator. Last, for branches on data and operators without a fake
    kernel, the forward runs on copies of the weights and the batch: that graph is valid for this batch only.

    If the model is compiled as a whole, equal computations are merged, because its compiled code merges them.

    Args:
        model: returns its loss, unless there is a `loss_fn`. Its parameters may be on the meta device.
        batch: the keyword dictionary of the model's forward, labels included. With `loss_fn`, anything with
            tensors in it: a mapping, a tuple, a dataclass. Tensors may be on the meta device.
        loss_fn: computes the scalar loss from the model and the batch; None if the model returns its loss:
            as a scalar, `.loss`, `["loss"]`, or in a tuple, first or as its only scalar.

    Returns:
        The joint graph, with one tangent and a gradient slot for every parameter.

    Raises:
        CaptureError: every strategy fails, nothing is trainable, or there is no scalar loss.
        TypeError, ValueError: the batch is not the keyword dictionary of the forward, and `loss_fn` is None.
    """
    merged = runs_as_one_region(model)
    model = unwrap(model)
    inputs = _inputs(model, batch, loss_fn)
    parameters = list_parameters(model)
    if not any(parameter.status == "selectable" for parameter in parameters):
        raise CaptureError(
            f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train"
        )
    refuse_compressed_sparse((*model.parameters(), *model.buffers(), *tensors_of(inputs.named)))
    device = device_of(model, tensors_of(inputs.named))
    model, named = off_meta(model, inputs.named, device)
    tensors = [*model.parameters(), *model.buffers(), *tensors_of(named)]
    failures = []
    for strategy in strategies(model, named, tensors):
        try:
            with _returned_inside(model, loss_fn) as inside, contextlib.ExitStack() as stack:
                stack.callback(restore_random_state, random_state())
                stack.enter_context(as_written(model, device))
                refuse_subclasses((*model.parameters(), *model.buffers(), *tensors_of(named)))
                module = strategy.run(LossModule(model, inputs, inside), named, stack)
                joint = aot_export_joint_with_descriptors(stack, module, (), named)
            _refuse_unknown_sizes(joint.graph_module)
            return _whole_model(joint.graph_module, parameters, strategy.name, merged)
        except CaptureError:
            raise
        except Exception as error:  # torch raises many types; the final error lists each
            failures.append((strategy, error))
            logger.info("capture failed: %s %s", strategy.sentence, error)
    without_values = failures[-1][0] is not WITH_VALUES
    explained = _explain(model, failures) + _tell_devices(model, inputs.named)
    raise CaptureError(explained, without_values=without_values) from failures[0][1]


def _inputs(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> Inputs:
    if loss_fn is None:
        check_batch(model, batch)
        return Inputs(dict(batch), _returned_loss)
    named, rebuild = split_batch(batch)
    # A forward hook (`_returned_inside`) records the other outputs of the model.
    return Inputs(dict(named), lambda model, tensors: (scalar_loss(loss_fn(model, rebuild(tensors))), ()))


def _returned_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    output = model(**batch)
    return loss_of(output), output


def _explain(model: nn.Module, failures: list[tuple[Strategy, Exception]]) -> str:
    lines = [f"could not capture {type(model).__name__} as one graph"]
    for strategy, error in failures:
        first_line = str(error).strip().partition("\n")[0]
        lines.append(f"  {strategy.sentence} {type(error).__name__}: {first_line}")
    lines.append("The usual reasons are a branch on data and an operator without a fake kernel.")
    if failures[-1][0] is not WITH_VALUES:
        lines.append(
            "Try it with real weights and a real batch, neither sharded nor on the meta device: then the "
            "model can be run on their values."
        )
    return "\n".join(lines)


def _tell_devices(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """Say so if no tensor of the batch is where the parameters are; else return nothing."""
    given, needed = _devices(tensors_of(batch)), _devices(model.parameters())
    if not given or not needed or given & needed:
        return ""
    there, here = ", ".join(sorted(needed)), ", ".join(sorted(given))
    return f"\nThe model is on {there} and the batch on {here}: move the batch there first."


def _devices(tensors: Iterable[torch.Tensor]) -> set[str]:
    return {str(tensor.device) for tensor in tensors if not tensor.is_meta}


class UnknownSizeError(Exception):
    """The size of a tensor depends on data."""


def _refuse_unknown_sizes(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if has_free_unbacked_symbols(tensors_of(node.meta.get("val"))):
            raise UnknownSizeError(f"the size of {node.name} ({node.target}) depends on data")


@contextlib.contextmanager
def _returned_inside(model: nn.Module, loss_fn: LossFunction | None) -> Iterator[list[Any]]:
    """Record the outputs of modules that compute all their outputs, even those that nobody reads.

    These are compiled blocks and the modules around them, and a model whose output goes to a loss function.

    Yields:
        The list to which forward hooks append the outputs.
    """
    returned: list[Any] = []
    blocks = compiled_blocks(model)
    inside = {module for block in blocks for module in block.modules() if module is not block}
    around = [module for module in model.modules() if module not in inside] if blocks else []
    watched = around or ([model] if loss_fn else [])
    handles = [
        module.register_forward_hook(lambda _m, _i, output: returned.append(output)) for module in watched
    ]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()


def _whole_model(
    module: fx.GraphModule, parameters: tuple[Parameter, ...], source: str, merged: bool
) -> JointGraph:
    """Clean up the graph that AOTAutograd traced, and name its gradient slots."""
    if merged and source == DYNAMO:
        module = eliminate_common_subexpressions(module)
    module = drop_effect_tokens(module)
    module = forget_added_zero(module, ZERO)
    module = keep_costly_outputs(module)
    module = renumber_names(module)
    canonical = names_of(parameters) | {ZERO: FORCED_GRADIENTS}
    descriptors = module.graph.output_node().meta["desc"]
    forward_outputs = count_forward_outputs(descriptors)
    slots = tuple(
        canonical[desc.grad_of.target.removeprefix("model.")]
        if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, ParamAOTInput)
        else None
        for desc in descriptors[forward_outputs:]
    )
    joint = JointGraph(module=module, forward_outputs=forward_outputs, slots=slots, source=source)
    verify(joint)
    return dataclasses.replace(joint, parameters=tuple(_mark_unused(p, joint.live) for p in parameters))


def _mark_unused(parameter: Parameter, live: frozenset[str]) -> Parameter:
    if parameter.status == "selectable" and parameter.fqn not in live:
        return dataclasses.replace(parameter, status="unused")
    return parameter
