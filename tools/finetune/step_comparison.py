"""Compare a step of a run with full fine-tuning in plain PyTorch, both timed on this machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from gtcompile.capture.model_io import loss_of
from gtcompile.costs.full_finetuning import full_finetuning
from gtcompile.huggingface.labelled_logits import all_logits_meant
from gtcompile.state.restore import restored, temporarily_training
from gtcompile.state.trained_set import train_only
from gtcompile.tools.common.flop_meter import check_step_flops
from gtcompile.tools.common.step_memory import passes_memory
from gtcompile.tools.finetune.step_counts import without_positions
from gtcompile.tools.runs.preparation import Batch

P = ParamSpec("P")
R = TypeVar("R")
PAIRS_TIMED = 5
"""Timed steps of each kind, after one that compiles."""
FULL_DOES_NOT_FIT = "a full step of plain PyTorch does not fit the memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComparison:
    """Full steps of plain PyTorch and steps of a run, timed in turns on one batch; nothing is updated.

    A full step trains all weights, without adapters.
    """

    full_flops: int
    """FLOPs of a full step, predicted and counted."""
    full_seconds: float
    """Median seconds of forward and backward of a full step of eager PyTorch, without gtcompile."""
    plan_seconds: float
    """Median seconds of forward and backward with the last selection, nothing from the prefix cache."""
    full_saved_bytes: int
    """Bytes that a full step saves for backward, measured."""
    full_peak_bytes: int
    """Most bytes that a full step allocates at once."""


def compare_steps(
    model: nn.Module, batch: Batch, selection: Mapping[str, Any], *, recomputes: bool, adapted: bool
) -> StepComparison:
    """Count and measure a full step, and time one of plain PyTorch in turns with the selection's.

    Args:
        model: with compiled blocks.
        batch: on the model's device; the full step computes the logits of all its positions.
        selection: as in `selections.json`.
        recomputes: whether compiled code recomputes activations to save memory.
        adapted: whether the model has adapters, which full fine-tuning does without.
    """
    device, plain = next(model.parameters()).device, without_positions(batch)
    count, measure, run = check_step_flops, passes_memory, torch.compiler.disable(seconds_of_step)
    full_seconds: list[float] = []
    plan_seconds: list[float] = []
    with restored(model), temporarily_training(model, None), all_logits_meant():
        if adapted:
            count, measure = _of_the_base(count, model), _of_the_base(measure, model)
            run = _of_the_base(run, model)
        full_flops = count(model, plain, selection["plain_full_flops"], recomputes=recomputes)
        memory = measure(model, plain, device)
        for _ in range(PAIRS_TIMED + 1):  # the first pair compiles
            train_only(model, None)
            full_seconds.append(run(model, plain))
            train_only(model, selection["trained"])
            plan_seconds.append(seconds_of_step(model, batch))
    return StepComparison(
        full_flops=full_flops,
        full_seconds=median(full_seconds[1:]),
        plan_seconds=median(plan_seconds[1:]),
        full_saved_bytes=memory.saved,
        full_peak_bytes=memory.peak,
    )


def _of_the_base(function: Callable[P, R], model: nn.Module) -> Callable[P, R]:
    """A function that runs steps, such that it trains all weights of the base model, eagerly."""
    eager: Callable[P, R] = torch.compiler.disable(function)

    def of_the_base(*args: P.args, **kwargs: P.kwargs) -> R:
        with full_finetuning(model):
            return eager(*args, **kwargs)

    return of_the_base


def seconds_of_step(model: nn.Module, batch: Batch, clock: Callable[[], float] = perf_counter) -> float:
    """Time a forward and backward, until the device has finished.

    Args:
        model: compiled or not.
        batch: on its device.
        clock: tells the time in seconds.
    """
    started = clock()
    loss = loss_of(model(**batch))
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    return clock() - started
