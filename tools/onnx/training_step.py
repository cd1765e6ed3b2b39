"""A joint graph as a function of plain tensors: parameters and batch to loss, gradients or updates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import JointGraph, names_of
from gtcompile.tools.onnx.convolution import convolution_gradients
from gtcompile.tools.onnx.options import OptimizerName
from gtcompile.torch_internals import (
    BufferAOTInput,
    OpOverload,
    ParamAOTInput,
    PlainAOTInput,
    TangentAOTInput,
)

aten = torch.ops.aten
IDENTITIES = (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default)
"""Operators that return their input unchanged."""
LR, STEP = "lr", "step"


def _silu_backward(gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    sigmoid = torch.sigmoid(value)
    return gradient * sigmoid * (1 + value * (1 - sigmoid))


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return source.to(target.dtype).expand(target.shape).clone()


WRITTEN_OUT: dict[object, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_gradients,
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.silu_backward.default: _silu_backward,
    aten.copy.default: _copy,
    aten.fill.Tensor: _copy,
}
"""Replacements of operators that the exporter cannot lower or lowers wrongly.

`convolution_backward` has neither a lowering nor a decomposition. A `view` is valid only for the strides that
a tensor had during capture. `silu_backward` has no lowering, and an export does not decompose it. A copy or a
fill that broadcasts is lowered to a cast, which does not broadcast.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The optimizer whose update is part of the step; hyperparameters as in `torch.optim`."""

    name: OptimizerName
    """`sgd` without momentum, or `adamw`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 1e-2
    """AdamW's decoupled decay, SGD's L2 term; per step it is multiplied by the learning rate."""


CONSTANT = "constant"
"""Metadata key of a placeholder that stands for a constant tensor of the graph."""


def plain_graph(joint: JointGraph) -> fx.GraphModule:
    """Rewrite a graph for export: `view` becomes `reshape`, and operators that return their input go.

    Constant tensors of the graph become placeholders with the tensor in their metadata under `constant`.

    Raises:
        CaptureError: the graph draws random numbers, which another runtime would draw differently.
    """
    twin = joint.copy()
    for node in list(twin.module.graph.nodes):
        if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise CaptureError(
                f"the training step draws random numbers ({node.target}), and ONNX Runtime draws others. "
                f"Set dropout to 0 in the configuration, or call model.eval() before the export."
            )
        if node.target in WRITTEN_OUT:
            node.target = WRITTEN_OUT[node.target]
        elif node.target in IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            twin.module.graph.erase_node(node)
        elif node.op == "get_attr":
            _make_input(twin.module, node)
    return fx.GraphModule(nn.Module(), twin.module.graph)


def _make_input(module: fx.GraphModule, node: fx.Node) -> None:
    tensor = getattr(module, str(node.target))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        placeholder = module.graph.placeholder(str(node.target))
    placeholder.meta = {CONSTANT: tensor}
    node.replace_all_uses_with(placeholder)
    module.graph.erase_node(node)


class TrainingStep(nn.Module):
    """The training step of a joint graph's live gradients, as a function of a flat list of tensors.

    Args:
        joint: of a whole model, its gradient slots restricted to the trained parameters.
        model: the captured model; its buffers become constants, its parameters inputs.
        batch_names: keys of the batch, each a tensor.
        update: the optimizer to include, or None for gradients.

    Raises:
        CaptureError: the graph draws random numbers, or has an input of an unknown kind.
    """

    def __init__(
        self, joint: JointGraph, model: nn.Module, batch_names: Sequence[str], update: Update | None = None
    ) -> None:
        super().__init__()
        self.graph = plain_graph(joint)
        self.update = update
        self.trained = tuple(p.fqn for p in joint.parameters if p.fqn in joint.live)
        self._slots = joint.slots
        self._forward_outputs = joint.forward_outputs
        canonical = names_of(joint.parameters)
        self._sources: list[tuple[str, str]] = []
        used: set[str] = set(self.trained)
        for node in self.graph.graph.find_nodes(op="placeholder"):
            kind, name = _source(node)
            if kind == "parameter":
                if not node.users:
                    self.graph.graph.erase_node(node)
                    continue
                name = canonical[name]
                used.add(name)
            elif kind == "buffer":
                self.register_buffer(_flat(name), model.get_buffer(name))
            elif kind == CONSTANT:
                self.register_buffer(_flat(name), node.meta[CONSTANT].clone())
            elif kind == "batch":
                name = batch_names[int(name)]
            self._sources.append((kind, name))
        self.graph.recompile()
        self.parameter_names = tuple(p.fqn for p in joint.parameters if p.fqn in used)
        read = {name for kind, name in self._sources if kind == "batch"}
        self.batch_names = tuple(name for name in batch_names if name in read)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order; the prefixes avoid clashes with names in the graph."""
        names = [f"parameter.{fqn}" for fqn in self.parameter_names]
        names += [f"batch.{name}" for name in self.batch_names]
        if self.update is not None:
            names += [f"optimizer.{LR}"]
        if self.update is not None and self.update.name == "adamw":
            names += [f"optimizer.{STEP}"]
            names += [f"moment{k}.{fqn}" for k in (1, 2) for fqn in self.trained]
        return tuple(names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        if self.update is None:
            return ("loss", *(f"gradient.{fqn}" for fqn in self.trained))
        names = [f"new_parameter.{fqn}" for fqn in self.trained]
        if self.update.name == "adamw":
            names += [f"new_moment{k}.{fqn}" for k in (1, 2) for fqn in self.trained]
        return ("loss", *names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the outputs in the order of `output_names` from tensors in the order of `input_names`."""
        inputs = dict(zip(self.input_names, tensors, strict=True))
        outputs = self.graph(*(self._value(kind, name, inputs) for kind, name in self._sources))
        loss = outputs[0]
        gradients: dict[str, torch.Tensor] = {}
        for name, gradient in zip(self._slots, outputs[self._forward_outputs :], strict=True):
            if gradient is not None and name is not None:
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        if self.update is None:
            return (loss, *(gradients[fqn] for fqn in self.trained))
        update = _sgd if self.update.name == "sgd" else _adamw
        return (loss, *update(self.update, self.trained, gradients, inputs))

    def _value(self, kind: str, name: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if kind == "tangent":
            return torch.ones(())
        return self.get_buffer(_flat(name)) if kind in ("buffer", CONSTANT) else inputs[f"{kind}.{name}"]


def _flat(name: str) -> str:
    return "buffer_" + name.replace(".", "__")


def _source(node: fx.Node) -> tuple[str, str]:
    """The kind and the name of a placeholder's source."""
    if CONSTANT in node.meta:
        return CONSTANT, node.name
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


def _sgd(
    update: Update,
    trained: Sequence[str],
    gradients: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> list[torch.Tensor]:
    lr = inputs[f"optimizer.{LR}"]
    old = {fqn: inputs[f"parameter.{fqn}"] for fqn in trained}
    return [old[fqn] - lr * (gradients[fqn] + update.weight_decay * old[fqn]) for fqn in trained]


def _adamw(
    update: Update,
    trained: Sequence[str],
    gradients: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> list[torch.Tensor]:
    """Loshchilov and Hutter's AdamW, in the order of operations of `torch.optim.AdamW`."""
    lr, step = inputs[f"optimizer.{LR}"], inputs[f"optimizer.{STEP}"]
    one, two = update.betas
    new, first, second = [], [], []
    for fqn in trained:
        old, gradient = inputs[f"parameter.{fqn}"], gradients[fqn]
        m = inputs[f"moment1.{fqn}"] * one + gradient * (1 - one)
        v = inputs[f"moment2.{fqn}"] * two + gradient * gradient * (1 - two)
        denominator = v.sqrt() / (1 - torch.pow(two, step)).sqrt() + update.eps
        decayed = old * (1 - lr * update.weight_decay)
        new.append(decayed - lr / (1 - torch.pow(one, step)) * m / denominator)
        first.append(m)
        second.append(v)
    return [*new, *first, *second]
