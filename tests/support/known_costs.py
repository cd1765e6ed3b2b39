"""Costs that several tests need are captured once: a capture takes most of a short test."""

from typing import Any

import pytest
import torch
from torch import nn

from gtcompile import BackwardCosts, backward_costs
from gtcompile.capture.model_io import unwrap
from gtcompile.capture.pristine_model import uses_compiled_code

_KNOWN: dict[object, BackwardCosts] = {}


def capture_costs_once(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    """Have these modules compute costs once for all models and batches of the same shapes.

    Args:
        monkeypatch: of the test.
        modules: they call `backward_costs` with a model of transformers.
    """
    for module in modules:
        monkeypatch.setattr(module, "backward_costs", _known_costs)


def _known_costs(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> BackwardCosts:
    plain: Any = unwrap(model)
    key = (
        type(plain),
        str(plain.config),
        any(getattr(module, "gradient_checkpointing", False) for module in plain.modules()),
        uses_compiled_code(plain),
        tuple((name, p.requires_grad) for name, p in plain.named_parameters()),
        tuple((name, value.shape) for name, value in batch.items()),
    )
    if key not in _KNOWN:
        _KNOWN[key] = backward_costs(model, batch, **options)
    return _KNOWN[key]
