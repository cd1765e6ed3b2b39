"""The model that `gtcompile bench` measures, with a batch; rivals train copies of it on the same memory."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gtcompile.capture.model_io import check_batch
from gtcompile.state.restore import restored
from gtcompile.tools.common.factories import call_factory, is_factory, language_model
from gtcompile.tools.models.loading import model_with_random_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured."""

    name: str
    """As asked for."""
    original: nn.Module
    """In training mode, on the device."""
    example: Mapping[str, Any]
    """The batch of every step, on the device."""
    shape: str
    """The batch in words."""

    def model(self) -> nn.Module:
        """A copy with parameters of its own on the same memory: freezing one copy leaves the others be."""
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
    name: str,
    device: torch.device,
    *,
    batch_size: int,
    length: int,
    target_length: int,
    dtype: torch.dtype | None = None,
) -> Subject:
    """The model of that name and a batch for it.

    Args:
        name: hub id, directory, `demo` (weights are random), or `module:function` (as it returns them).
        device: where to train.
        batch_size: rows.
        length: input tokens per row.
        target_length: answer tokens per row of an encoder-decoder.
        dtype: of the weights; None takes float32, or what a factory returns.

    Raises:
        ValueError: there is no such model, or no batch for it, or a factory is asked for another type.
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
    shape = "its own shape"
    if batch is None:
        model = language_model(name, model)
        batch = random_batch(model, batch_size=batch_size, length=length, target_length=target_length)
        check_length(model, batch)
        answer = f", {target_length} answer tokens" if model.config.is_encoder_decoder else ""
        shape = f"{batch_size} x {length} tokens{answer}"
    check_batch(model, batch)
    if isinstance(model, PreTrainedModel):
        model.config.use_cache = False
    moved = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    return Subject(name=name, original=model, example=moved, shape=shape)


def random_batch(
    model: PreTrainedModel, *, batch_size: int, length: int, target_length: int
) -> dict[str, torch.Tensor]:
    """Random tokens, all of them labelled, or random answers of an encoder-decoder.

    Raises:
        ValueError: the model has no vocabulary, so that tokens are not what it takes.
    """
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"{type(model).__name__} has no vocabulary to draw a batch from; give it as module:function, a "
            f"function that returns the model and a batch"
        )
    columns = target_length if model.config.is_encoder_decoder else length
    ids = torch.randint(1, size, (batch_size, length))
    labels = ids if columns == length else torch.randint(1, size, (batch_size, columns))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels.clone()}


def check_length(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """See that a model runs on rows longer than its configuration's positions.

    One row is tried: computed positions (rotary) go on, those that are looked up end. Nothing changes.

    Raises:
        ValueError: it does not.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[1], batch["labels"].shape[1])
    if not isinstance(positions, int) or longest <= positions:
        return
    try:
        with restored(model), torch.no_grad():
            model(**{name: value[:1].to(model.device) for name, value in batch.items()})
    except (IndexError, RuntimeError) as error:
        lower = "--length or --target-length" if model.config.is_encoder_decoder else "--length"
        raise ValueError(
            f"{type(model).__name__} has {positions} positions and does not run on {longest} tokens; "
            f"lower {lower}"
        ) from error
