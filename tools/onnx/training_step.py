"""A joint graph as a function of plain tensors: parameters and batch to loss and gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import JointGraph, names_of
from gtcompile.passes.free_strides import free_strides
from gtcompile.passes.random_draws import draws_random_numbers
from gtcompile.tools.onnx.decompositions import WRITTEN_OUT
from gtcompile.torch_internals import BufferAOTInput, ParamAOTInput, PlainAOTInput, TangentAOTInput


class TrainingStep(nn.Module):
    """The training step of a joint graph's live gradients, as a function of a flat list of tensors.

    Args:
        joint: of a whole model, its gradient slots restricted to the trained parameters.
        model: the captured model; its buffers become constants, its parameters inputs.
        batch_names: keys of the batch, each a tensor.

    Raises:
        CaptureError: the graph draws random numbers, or has an input of an unknown kind.
    """

    def __init__(self, joint: JointGraph, model: nn.Module, batch_names: Sequence[str]) -> None:
        super().__init__()
        _refuse_random_numbers(joint)
        module = free_strides(joint.module)
        self._graph = _Written(module)
        self.trained = tuple(p.fqn for p in joint.parameters if p.fqn in joint.live)
        self._slots = joint.slots
        self._forward_outputs = joint.forward_outputs
        canonical = names_of(joint.parameters)
        self._sources: list[tuple[str, str]] = []
        used: set[str] = set(self.trained)
        for node in module.graph.find_nodes(op="placeholder"):
            kind, name = _source(node)
            if kind == "parameter" and not node.users:
                kind = "unused"
            elif kind == "parameter":
                name = canonical[name]
                used.add(name)
            elif kind == "buffer":
                self.register_buffer(_flat(name), model.get_buffer(name))
            elif kind == "batch":
                name = batch_names[int(name)]
            self._sources.append((kind, name))
        self.parameter_names = tuple(p.fqn for p in joint.parameters if p.fqn in used)
        read = {name for kind, name in self._sources if kind == "batch"}
        self.batch_names = tuple(name for name in batch_names if name in read)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order; the prefixes avoid clashes with names in the graph."""
        parameters = (f"parameter.{fqn}" for fqn in self.parameter_names)
        return (*parameters, *(f"batch.{name}" for name in self.batch_names))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return ("loss", *(f"gradient.{fqn}" for fqn in self.trained))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the outputs in the order of `output_names` from tensors in the order of `input_names`."""
        inputs = dict(zip(self.input_names, tensors, strict=True))
        values = (self._value(kind, name, inputs) for kind, name in self._sources)
        outputs = self._graph.run(*values, enable_io_processing=False)
        loss = outputs[0]
        gradients: dict[str, torch.Tensor] = {}
        for name, gradient in zip(self._slots, outputs[self._forward_outputs :], strict=True):
            if gradient is not None and name is not None:
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return (loss, *(gradients[fqn] for fqn in self.trained))

    def _value(self, kind: str, name: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if kind == "unused":
            return None
        if kind == "tangent":
            return torch.ones(())
        return self.get_buffer(_flat(name)) if kind == "buffer" else inputs[f"{kind}.{name}"]


class _Written(fx.Interpreter):
    """Runs a graph, with our own functions for the operators in `WRITTEN_OUT`."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator, or the function that stands for it."""
        return super().call_function(WRITTEN_OUT.get(target, target), args, kwargs)


def _refuse_random_numbers(joint: JointGraph) -> None:
    drawing = next(filter(draws_random_numbers, joint.graph.nodes), None)
    if drawing is not None:
        raise CaptureError(
            f"the training step draws random numbers ({drawing.target}), and ONNX Runtime draws others. "
            f"Set dropout to 0 in the configuration, or call model.eval() before the export."
        )


def _flat(name: str) -> str:
    return "buffer_" + name.replace(".", "__")


def _source(node: fx.Node) -> tuple[str, str]:
    """The kind and the name of a placeholder's source."""
    descriptor = node.meta.get("desc")
    if isinstance(descriptor, ParamAOTInput):
        return "parameter", descriptor.target.removeprefix("model.")
    if isinstance(descriptor, BufferAOTInput):
        return "buffer", descriptor.target.removeprefix("model.")
    if isinstance(descriptor, TangentAOTInput):
        return "tangent", ""
    if isinstance(descriptor, PlainAOTInput):
        return "batch", str(descriptor.idx)
    raise CaptureError(f"the training step has an input of an unknown kind: {node.name} ({descriptor})")
