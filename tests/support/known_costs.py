"""Costs that several tests need are captured once: a capture takes most of a short test."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from gtcompile import BackwardCosts, backward_costs
from gtcompile.capture.model_io import unwrap
from gtcompile.capture.pristine_model import uses_compiled_code
from gtcompile.training.step_costs import CostsByShape

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


@contextmanager
def shapes_captured_once() -> Iterator[None]:
    """Within the block, `AdaptiveBackprop` captures costs once for a class of models and a batch's shape.

    The models of one class must be equal.
    """
    known: dict[object, Any] = {}
    capture = CostsByShape._capture

    def remembered(self: Any, batch: dict[str, torch.Tensor], budget_of: Any) -> Any:
        shape = tuple(batch["input_ids"].shape)
        key = type(self._model), self._blocks, self._loss_fn, budget_of, shape
        if key not in known:
            known[key] = capture(self, batch, budget_of)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostsByShape, "_capture", remembered)
        yield
