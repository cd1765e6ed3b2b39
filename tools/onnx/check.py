"""An exported training step run in ONNX Runtime on a batch it never saw, beside eager PyTorch."""

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
"""How far a gradient may be off: of its own largest element, and of the largest of all gradients.

The second is for parameters like a bias of keys, whose gradient is nothing but rounding."""

SHAPES = "constants made from the captured batch are the usual cause; try attn_implementation='eager'"
"""Why a step that takes the same way for every batch is wrong for another one."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near an exported step came to eager PyTorch on one batch."""

    loss: float
    """Relative difference of the losses."""
    gradient: float
    """Largest difference of a gradient, relative to the largest element of all gradients."""
    worst: str
    """The parameter it was seen at."""
    refused: tuple[str, ...]
    """Parameters whose gradient is further off than allowed."""

    def __str__(self) -> str:
        return (
            f"loss within {self.loss:.1e}, gradients within {self.gradient:.1e} of the largest ({self.worst})"
        )


def runtime_installed() -> bool:
    """Whether ONNX Runtime is there to run an export with."""
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
        """All outputs by name; inputs the model does not have are left out."""
        wanted = [value.name for value in self._session.get_inputs()]
        values = self._session.run(None, {name: inputs[name].detach().cpu().numpy() for name in wanted})
        names = [value.name for value in self._session.get_outputs()]
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def inputs_of(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of a model and a batch by the names an exported step has for them."""
    parameters = {f"parameter.{fqn}": parameter for fqn, parameter in model.named_parameters()}
    return parameters | {f"batch.{name}": value for name, value in batch.items()}


def fresh_batch(
    batch: Mapping[str, torch.Tensor], seed: int, *, resize: bool = False
) -> dict[str, torch.Tensor]:
    """Another batch of the same values, each tensor's reordered, so that all stay in range.

    Args:
        batch: tensors whose first two dimensions are rows and positions, or fewer.
        seed: of the order.
        resize: also one row more, and a position less of what has two dimensions.
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
    """Run a step that returns gradients, and eager PyTorch, on the same batch.

    Raises:
        CaptureError: ONNX Runtime cannot run the step.
    """
    try:
        outputs = session(inputs_of(model, batch))
    except Exception as error:  # ONNX Runtime's have no common base of their own
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
    """The agreement itself, where it is one.

    Args:
        agreement: on a batch the export never saw.
        cause: why they would differ, and what helps; the end of the message where they do.

    Raises:
        CaptureError: loss or gradients differ from eager's.
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
