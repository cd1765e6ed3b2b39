"""What steps with one trained set cost: predicted, counted and measured, whole and from the prefix cache."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gtcompile.costs.backward_costs import backward_costs
from gtcompile.huggingface.labelled_logits import POSITIONS, TARGETS
from gtcompile.selection.selection import Selection
from gtcompile.tools.common.flop_meter import check_step_flops
from gtcompile.tools.common.step_memory import passes_memory
from gtcompile.tools.runs.preparation import Batch
from gtcompile.training.adaptive import AdaptiveBackprop

_ONCE_PER_SET = (
    "counted_step_flops",
    "counted_cached_step_flops",
    "plain_full_flops",
    "saved_bytes",
    "peak_bytes",
)


def measure_steps(
    model: nn.Module,
    batch: Batch,
    adaptive: AdaptiveBackprop,
    selection: Selection,
    former: Sequence[Mapping[str, Any]],
    *,
    recomputes: bool,
) -> dict[str, Any]:
    """Count and measure a step of a selection, unless one with the same set was measured before.

    Args:
        model: with compiled blocks; trains the selection.
        batch: on the model's device.
        adaptive: made the selection.
        selection: the latest one.
        former: earlier selections with what this function returned for them.
        recomputes: whether the backward recomputes activations to save memory.

    Raises:
        GTCompileError: a prediction is not exact.
    """
    cached, device = adaptive.cached_step_flops, next(model.parameters()).device
    for earlier in former:
        if frozenset(earlier["trained"]) == selection.trained and earlier["cached_step_flops"] == cached:
            return {key: earlier[key] for key in _ONCE_PER_SET}
    with cache_paused(adaptive):
        counted = check_step_flops(model, batch, selection.step_flops, recomputes=recomputes)
        memory = passes_memory(model, batch, device)
        plain = former[0]["plain_full_flops"] if former else _plain_full_flops(model, batch, selection)
    counted_cached = counted
    if adaptive.prefix_cache is not None and cached < selection.step_flops:
        with adaptive.prefix_cache.pretend_hit():
            counted_cached = check_step_flops(model, batch, cached, recomputes=recomputes)
    return {
        "counted_step_flops": counted,
        "counted_cached_step_flops": counted_cached,
        "plain_full_flops": plain,
        **memory.as_dict(),
    }


def completed(selection: Mapping[str, Any]) -> dict[str, Any]:
    """A selection with the values that runs of an earlier version, without these savings, did not write."""
    return {
        "cached_step_flops": selection["step_flops"],
        "counted_cached_step_flops": selection["counted_step_flops"],
        "plain_full_flops": selection["full_flops"],
        **selection,
    }


def cache_paused(adaptive: AdaptiveBackprop) -> contextlib.AbstractContextManager[None]:
    """A context in which every block is computed."""
    cache = adaptive.prefix_cache
    return contextlib.nullcontext() if cache is None else cache.paused()


def without_positions(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch without the names of its labelled positions, so that all logits are computed."""
    return {name: tensor for name, tensor in batch.items() if name not in (POSITIONS, TARGETS)}


def _plain_full_flops(model: nn.Module, batch: Batch, selection: Selection) -> int:
    """FLOPs of a full step that computes all logits."""
    if POSITIONS not in batch:
        return selection.full_flops
    return backward_costs(model, without_positions(batch)).full_flops
