"""The training step of a trained set as plain ONNX: `gtcompile export --onnx`."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gtcompile.capture.capture import capture
from gtcompile.capture.model_io import unwrap
from gtcompile.errors import CaptureError
from gtcompile.graph.joint_graph import JointGraph, names_of
from gtcompile.graph.names import match_patterns
from gtcompile.passes.pipeline import restrict_gradients
from gtcompile.tools.onnx.check import (
    SHAPES,
    Agreement,
    Session,
    compare,
    fresh_batch,
    require,
    runtime_installed,
)
from gtcompile.tools.onnx.onnx_graph import append, lower, size_of, write
from gtcompile.tools.onnx.optimizer_step import OptimizerStep, Update
from gtcompile.tools.onnx.training_step import TrainingStep
from gtcompile.torch_internals import mark_dynamic

Batch = Mapping[str, torch.Tensor]
FRESH = 1
"""Seed of the fresh batch that an export is compared on."""
ONE_BRANCH = (
    "the model branches on data, and the file holds only the branch that this batch took with these "
    "weights: it is wrong if another batch, or later weights, would take another branch"
)
"""A warning for readers of such a file; it is written into the file too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An exported training step."""

    path: Path
    """The model's file."""
    trained: tuple[str, ...]
    """Parameters with a gradient or an update in it, in registration order."""
    nodes: int
    """Number of ONNX operators."""
    bytes: int
    """Bytes of the model without its weights, which are inputs."""
    agreement: Agreement | None
    """Agreement with eager PyTorch on a fresh batch; None without ONNX Runtime."""
    one_branch: bool
    """Whether the model branches on data; the file then has only the branch of the exported batch."""

    def __str__(self) -> str:
        said = str(self.agreement) if self.agreement else "not run: install onnxruntime to compare with eager"
        size = f"{self.nodes} operators, {self.bytes / 1e6:.1f} MB, {len(self.trained)} trained parameters"
        return f"{self.path}: {size}; {said}" + (f"\nnote: {ONE_BRANCH}" if self.one_branch else "")


def export_onnx(
    model: nn.Module,
    batch: Batch,
    path: Path,
    *,
    trained: Iterable[str] | None = None,
    update: Update | None = None,
    dynamic: bool = False,
) -> Export:
    """Write the training step of a trained set as ONNX, after checking that it agrees with eager PyTorch.

    Inputs are `parameter.FQN` (tied weights once, under their first name), `batch.NAME`, and with an update
    `optimizer.lr`, `optimizer.step` (float, from 1) and `moment1.FQN`, `moment2.FQN`. Outputs are `loss` and
    `gradient.FQN`, or with an update `new_parameter.FQN`, `new_moment1.FQN` and `new_moment2.FQN`, of trained
    parameters alone. Buffers are constants.

    Args:
        model: on the CPU, float32, without dropout; returns its scalar loss or an output with `.loss`.
        batch: keyword dictionary of one batch, all tensors.
        path: of the file; written at the end, whole.
        trained: FQNs or patterns; None trains everything.
        update: the optimizer whose step to include.
        dynamic: whether other batch sizes work too, and other lengths of batch tensors with two dimensions.

    Raises:
        CaptureError: a parameter is not in float32, or the step cannot be captured or lowered, or differs
            from eager PyTorch.
        ValueError: a pattern matches nothing, or the path cannot be written.
        TypeError: the batch holds a value that is no tensor.
    """
    model = unwrap(model)
    _check_arguments(model, batch, path)
    with exportable(model):
        joint = _trained_joint(model, batch, trained, dynamic=dynamic)
        step = TrainingStep(joint, model, list(batch))
        agreement = None
        proto = _lowered(step, model, batch, dynamic=dynamic)
        if runtime_installed():
            another = fresh_batch(batch, FRESH, resize=dynamic)
            cause = ONE_BRANCH if joint.follows_values else SHAPES
            agreement = require(compare(Session(proto), model, another, step.trained), cause)
        if update is not None:
            following = OptimizerStep(update, step.trained)
            proto = append(proto, lower(following, following.examples(dict(model.named_parameters()))))
    if joint.follows_values:
        proto.doc_string = ONE_BRANCH
    size = size_of(proto)  # before its constants go to a separate file
    write(proto, path)
    return Export(
        path=path,
        trained=step.trained,
        nodes=len(proto.graph.node),
        bytes=size,
        agreement=agreement,
        one_branch=joint.follows_values,
    )


def _check_arguments(model: nn.Module, batch: Batch, path: Path) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise CaptureError(
                f"expected parameters in float32, got {parameter.dtype} ({name}): "
                f"ONNX Runtime has few kernels for others. Call model.float() before the export"
            )
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"expected a batch of tensors, got {name}={value!r}; set it in the model's configuration"
            )
    if not path.parent.is_dir():
        raise ValueError(f"no folder {str(path.parent)!r} to write {path.name} to; make it first")
    if path.is_dir():
        raise ValueError(f"expected a file to write to, {str(path)!r} is a folder")


@contextlib.contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Compute attention and experts with plain operators within the block."""
    config: Any = getattr(model, "config", None)
    experts = getattr(config, "_experts_implementation", None)
    with sdpa_kernel(SDPBackend.MATH):
        if experts is not None:
            config._experts_implementation = "batched_mm"
        try:
            yield
        finally:
            if experts is not None:
                config._experts_implementation = experts


def _trained_joint(
    model: nn.Module, batch: Batch, trained: Iterable[str] | None, *, dynamic: bool
) -> JointGraph:
    batch = {name: value.clone() for name, value in batch.items()}
    for value in batch.values() if dynamic else ():
        for dimension in range(_changing(value)):
            mark_dynamic(value, dimension)
    joint = capture(model, batch)
    wanted = joint.live if trained is None else match_patterns(names_of(joint.parameters), trained)
    if not wanted & joint.live:
        raise CaptureError("none of the trained parameters has a gradient in this model: nothing to export")
    return restrict_gradients(joint, wanted)


def _changing(value: torch.Tensor) -> int:
    """How many leading dimensions may change: rows and positions, but not the channels of an image."""
    return 2 if value.dim() == 2 else min(value.dim(), 1)


def _lowered(step: TrainingStep, model: nn.Module, batch: Batch, *, dynamic: bool) -> onnx.ModelProto:
    parameters = dict(model.named_parameters())
    examples = []
    shapes = {}
    for name in step.input_names:
        kind, _, rest = name.partition(".")
        if kind == "batch":
            examples.append(batch[rest].clone())  # one tensor under two names would become one input
            shapes[name] = dict.fromkeys(range(_changing(batch[rest])), torch.export.Dim.AUTO)
        else:
            examples.append(parameters[rest].detach())
    return lower(step, examples, shapes if dynamic else None)
