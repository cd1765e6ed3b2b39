"""Count the FLOPs that a training step really executes, compiled regions included."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from gtcompile.capture.model_io import loss_of, unwrap
from gtcompile.errors import GTCompileError
from gtcompile.graph.flops import count_flops
from gtcompile.state.restore import restored
from gtcompile.torch_internals import inductor_config


def count_step_flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Count one forward and backward with the current trained set; nothing changes.

    Args:
        model: compiled or not.
        batch: keyword dictionary with labels.
    """
    with restored(unwrap(model)):
        loss_of(model(**batch)).backward()  # compiles, which is not part of a step
        with count_flops() as counter:
            loss_of(model(**batch)).backward()
    return int(counter.get_total_flops())


def check_step_flops(
    model: nn.Module, batch: Mapping[str, Any], predicted: int, *, recomputes: bool = False
) -> int:
    """Count one step and compare it with the prediction.

    Args:
        model: compiled or not.
        batch: keyword dictionary with labels.
        predicted: FLOPs that the costs predict.
        recomputes: whether the backward recomputes activations to save memory; then more FLOPs are right too.

    Returns:
        The FLOPs counted.

    Raises:
        GTCompileError: the prediction is not exact.
    """
    counted = count_step_flops(model, batch)
    if counted < predicted and (inductor_config.max_autotune or inductor_config.max_autotune_gemm):
        raise GTCompileError(
            f"of {predicted} FLOPs that were predicted, only {counted} were counted. With max_autotune, "
            f"Inductor generates kernels for products, which cannot be counted; switch off max_autotune and "
            f"max_autotune_gemm in torch._inductor.config."
        )
    if counted < predicted or (counted > predicted and not recomputes):
        raise GTCompileError(
            f"a training step executes {counted} FLOPs where {predicted} were predicted. The costs do "
            f"not describe this model, so no budget would hold; a graph break may be the reason."
        )
    return counted
