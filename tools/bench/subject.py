"""The model and batch that `gtcompile bench` measures. Candidates train copies that share its memory."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gtcompile.capture.model_io import check_batch
from gtcompile.tools.common.options import BatchShape
from gtcompile.tools.models.factories import call_factory, is_factory, language_model
from gtcompile.tools.models.loading import model_with_random_weights
from gtcompile.tools.models.random_batch import check_length, random_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSubject:
    """A model and the batch of every step."""

    name: str
    """The name given on the command line."""
    original: nn.Module
    """The model in training mode, on the device."""
    example: Mapping[str, Any]
    """The batch of every step, on the device."""
    shape: str
    """The batch in words."""

    def model(self) -> nn.Module:
        """Copy the model; the copy has its own parameters on the same memory, so it can be frozen alone."""
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.original.parameters()
        }
        return copy.deepcopy(self.original, shared)

    def batch(self) -> Mapping[str, Any]:
        """The batch of every step."""
        return self.example

    def __str__(self) -> str:
        kind, elements = type(self.original).__name__, sum(p.numel() for p in self.original.parameters())
        types = {str(p.dtype).removeprefix("torch.") for p in self.original.parameters()}
        size = f"{elements / 1e6:.3g} M parameters in {' and '.join(sorted(types))}"
        return f"{self.name}: {kind}, {size}, batches of {self.shape}"


def find_subject(
    name: str, device: torch.device, shape: BatchShape, dtype: torch.dtype | None = None
) -> ModelSubject:
    """Build a model by name, with a batch for it.

    Args:
        name: hub id, directory, `demo` (weights are random), or `module:function` (as it returns them).
        device: where to train.
        shape: of the batch, unless a factory returns its own.
        dtype: of the weights; None takes float32, or the type that a factory returns.

    Raises:
        ValueError: there is no such model or no batch for it, or a factory's weights should change type.
    """
    torch.manual_seed(0)
    batch: Mapping[str, Any] | None = None
    if is_factory(name):
        if dtype is not None:
            raise ValueError(f"{name} makes its own weights; return them in {dtype} there, without --dtype")
        model, batch = call_factory(name)
        model = model.to(device).train()
    else:
        model = cast(nn.Module, model_with_random_weights(name, device)).to(dtype or torch.float32)
    words = "its own shape"
    if batch is None:
        model = language_model(name, model)
        batch = random_batch(model, shape)
        check_length(model, batch)
        words = shape.describe(model.config.is_encoder_decoder)
    check_batch(model, batch)
    if isinstance(model, PreTrainedModel):
        model.config.use_cache = False
    moved = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    return ModelSubject(name=name, original=model, example=moved, shape=words)
