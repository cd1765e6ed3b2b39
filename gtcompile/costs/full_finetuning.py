"""FLOPs of full fine-tuning, of which a budget may be a share although only adapters are trained."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from gtcompile.capture.model_io import LossFunction, unwrap
from gtcompile.costs.backward_costs import backward_costs
from gtcompile.state.restore import flags_kept


def full_finetuning_flops(model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> int:
    """Return the FLOPs of a step that trains every floating-point parameter, without PEFT's adapters.

    That is the step of the base model, at the shapes of this batch, whatever is frozen. Without adapters of
    PEFT it is the step of the model itself with everything trained.

    Args:
        model: may be compiled; its flags and adapters are afterwards as they were.
        batch: as for `backward_costs`.
        loss_fn: as for `backward_costs`.

    Raises:
        ValueError: the model is quantized, so that full fine-tuning of it is not possible.
        CaptureError: as for `backward_costs`.
    """
    with full_finetuning(model):
        return backward_costs(model, batch, loss_fn=loss_fn).full_flops


@contextlib.contextmanager
def full_finetuning(model: nn.Module) -> Iterator[None]:
    """Within the block, let every parameter require a gradient, and switch off PEFT's adapters.

    Code that was compiled before must not run in the block.

    Args:
        model: its flags and adapters are afterwards as they were.

    Raises:
        ValueError: the model is quantized, so that full fine-tuning of it is not possible.
    """
    inner = unwrap(model)
    refuse_quantized(inner)
    with flags_kept(inner), _adapters_off(inner):
        for parameter in inner.parameters():
            parameter.requires_grad_(True)
        yield


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model with quantized weights.

    Raises:
        ValueError: names the first such weight, or the model's class.
    """
    integers = (
        fqn
        for fqn, parameter in model.named_parameters()
        if not (parameter.is_floating_point() or parameter.is_complex())
    )
    if (fqn := next(integers, None)) is not None or getattr(model, "is_quantized", False):
        what = type(model).__name__ if fqn is None else fqn
        raise ValueError(
            f'budget_of="full_finetuning" has no meaning here: {what} is quantized, and quantized weights '
            f'cannot be trained; use budget_of="step"'
        )


@contextlib.contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block, switch off the adapters of PEFT, whose layers are known by their methods."""
    modules: list[Any] = list(model.modules())
    with contextlib.ExitStack() as stack:
        for module in modules:
            if hasattr(module, "peft_config") and hasattr(module, "disable_adapter"):
                stack.enter_context(module.disable_adapter())
        for layer in [module for module in modules if hasattr(module, "adapter_layer_names")]:
            if not layer.disable_adapters:
                layer.enable_adapters(False)
                stack.callback(layer.enable_adapters, True)
        yield
