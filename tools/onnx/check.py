"""Compare an exported training step in ONNX Runtime with eager PyTorch on a fresh batch."""

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import load_external_data_for_model
from torch import nn

from gtcompile.capture.model_io import loss_of
from gtcompile.errors import CaptureError
from gtcompile.testing import reference_gradients
from gtcompile.tools.onnx.onnx_graph import is_large, write

RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""Largest allowed error of a gradient, relative to its own largest element and to that of all gradients.

The second is for parameters such as the bias of attention keys, whose gradient is only rounding."""

SHAPES = "constants made from the captured batch are the usual cause; try attn_implementation='eager'"
"""The usual cause if a step without branches on data is wrong for another batch."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How closely an exported step agrees with eager PyTorch on one batch."""

    loss: float
    """Relative difference of the losses."""
    gradient: float
    """Largest difference of a gradient, relative to the largest element of all gradients."""
    worst: str
    """The parameter with this difference."""
    refused: tuple[str, ...]
    """Parameters whose gradient differs by more than allowed."""

    def __str__(self) -> str:
        return (
            f"loss within {self.loss:.1e}, gradients within {self.gradient:.1e} of the largest ({self.worst})"
        )


def runtime_installed() -> bool:
    """Whether ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


class Session:
    """An ONNX model in ONNX Runtime on the CPU, from tensors by name to tensors by name."""

    def __init__(self, model: onnx.ModelProto | str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3

        def load(source: bytes | str) -> Any:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

        if isinstance(model, str):
            self._session: Any = load(model)
        elif is_large(model):  # no string holds it
            with tempfile.TemporaryDirectory() as folder:
                write(model, Path(folder) / "step.onnx")
                self._session = load(str(Path(folder) / "step.onnx"))
                load_external_data_for_model(model, folder)  # writing took the constants out of it
        else:
            self._session = load(model.SerializeToString())

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the model and return all outputs by name; inputs that it does not have are ignored."""
        wanted = [value.name for value in self._session.get_inputs()]
        values = self._session.run(None, {name: inputs[name].detach().cpu().numpy() for name in wanted})
        names = [value.name for value in self._session.get_outputs()]
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def inputs_of(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a model and a batch, under the input names of an exported step."""
    parameters = {f"parameter.{fqn}": parameter for fqn, parameter in model.named_parameters()}
    return parameters | {f"batch.{name}": value for name, value in batch.items()}


def fresh_batch(
    batch: Mapping[str, torch.Tensor], seed: int, *, resize: bool = False
) -> dict[str, torch.Tensor]:
    """Shuffle the values of each tensor of a batch, so that all values stay in range.

    Args:
        batch: tensors whose first two dimensions are rows and positions, or fewer.
        seed: of the shuffle.
        resize: also add a row, and remove a position of tensors with two dimensions.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _reordered(value, generator, resize) for name, value in batch.items()}


def _reordered(value: torch.Tensor, generator: torch.Generator, resize: bool) -> torch.Tensor:
    if value.dim() == 0:
        return value
    if resize:
        value = torch.cat([value, value[:1]])
        value = value[:, :-1] if value.dim() == 2 and value.shape[1] > 2 else value
    order = torch.randperm(value.numel(), generator=generator)
    return value.reshape(-1)[order].reshape(value.shape).contiguous()


def compare(
    session: Session, model: nn.Module, batch: Mapping[str, torch.Tensor], trained: Sequence[str]
) -> Agreement:
    """Run a step that returns gradients and eager PyTorch on the same batch.

    Raises:
        CaptureError: ONNX Runtime cannot run the step.
    """
    try:
        outputs = session(inputs_of(model, batch))
    except Exception as error:  # ONNX Runtime's errors have no common base class
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        reason = str(error).strip().replace("\n", " ")
        raise CaptureError(
            f"ONNX Runtime cannot run the exported step on a fresh batch, so it is not written: {reason}. "
            f"A shape fixed while it was captured is the usual cause; leave dynamic shapes out"
        ) from error
    parameters = dict(model.named_parameters())
    found = reference_gradients(model, batch, trained)
    expected = {fqn: found.get(fqn, torch.zeros_like(parameters[fqn])) for fqn in trained}
    with torch.no_grad():
        loss = loss_of(model(**batch)).item()
    largest = max((float(gradient.abs().max()) for gradient in expected.values()), default=0.0) or 1.0
    off = {fqn: float((outputs[f"gradient.{fqn}"] - expected[fqn]).abs().max()) for fqn in trained}
    refused = tuple(
        fqn
        for fqn, error in off.items()
        if not error <= RELATIVE * float(expected[fqn].abs().max()) + ABSOLUTE * largest
    )
    worst = max(off, key=off.__getitem__)
    loss_error = abs(float(outputs["loss"]) - loss) / max(abs(loss), 1e-12)
    return Agreement(loss_error, off[worst] / largest, worst, refused)


def require(agreement: Agreement, cause: str) -> Agreement:
    """Refuse an export that differs from eager PyTorch, and return the agreement otherwise.

    Args:
        agreement: on a fresh batch.
        cause: the likely cause of a difference and what helps; ends the message.

    Raises:
        CaptureError: the loss or gradients differ.
    """
    if agreement.refused or not agreement.loss <= RELATIVE:
        named = ", ".join(agreement.refused[:3]) or "the loss"
        raise CaptureError(
            f"the exported step differs from eager PyTorch on a fresh batch, so it is not written: "
            f"{agreement}; "
            f"too far off: {named}{' and others' if len(agreement.refused) > 3 else ''}; "
            f"{cause}"
        )
    return agreement
