"""What steps with one trained set cost: predicted, counted and measured, whole and from the prefix cache."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from gtcompile.costs.batch_shapes import BatchShapes, batch_shapes
from gtcompile.costs.budgets import BudgetOf
from gtcompile.huggingface.labelled_logits import POSITIONS, TARGETS, all_logits_meant
from gtcompile.tools.common.flop_meter import check_step_flops
from gtcompile.tools.common.step_memory import passes_memory
from gtcompile.tools.runs.preparation import Batch
from gtcompile.training.adaptive import AdaptiveBackprop
from gtcompile.training.step_costs import CostsByShape

_ONCE_PER_SET = (
    "counted_step_flops",
    "counted_cached_step_flops",
    "plain_full_flops",
    "saved_bytes",
    "peak_bytes",
)


class Counts(NamedTuple):
    """FLOPs of a forward and backward."""

    step_flops: int
    """If everything is computed."""
    cached_step_flops: int
    """If it starts from the prefix cache; without one, `step_flops`."""


class PassCounter:
    """Counts what forward and backward execute, once at every shape of batches, and checks the prediction.

    Args:
        model: with compiled blocks; trains what `adaptive` has selected.
        adaptive: predicts.
        recomputes: whether the backward recomputes activations to save memory.
        adapted: whether the model has adapters.
    """

    def __init__(
        self, model: nn.Module, adaptive: AdaptiveBackprop, *, recomputes: bool, adapted: bool
    ) -> None:
        self.adaptive, self._model = adaptive, model
        self._recomputes, self._adapted = recomputes, adapted
        self._plain = CostsByShape(model, None)
        self._counts: dict[BatchShapes, tuple[Counts, Counts]] = {}

    def knows(self, batch: Batch) -> bool:
        """Whether a pass at the shapes of this batch was counted before."""
        return batch_shapes(batch) in self._counts

    def count(self, batch: Batch) -> Counts:
        """Count a whole pass, and one from the prefix cache if there is one; nothing changes.

        Args:
            batch: on the model's device.

        Raises:
            GTCompileError: a prediction is not exact.
        """
        costs, cache = self.adaptive.costs_of(batch), self.adaptive.prefix_cache
        with cache_paused(self.adaptive):
            whole = cached = self._checked(batch, costs.step_flops)
        if cache is not None and costs.cached_step_flops < costs.step_flops:
            with cache.pretend_hit():
                cached = self._checked(batch, costs.cached_step_flops)
        counted = Counts(whole, cached)
        predicted = Counts(costs.step_flops, costs.cached_step_flops)
        self._counts[batch_shapes(batch)] = predicted, counted
        return counted

    def taken(self, batch: Batch, *, hit: bool) -> dict[str, int]:
        """FLOPs of a pass with the present set: predicted, counted, and those of full fine-tuning.

        Counted are those of the pass that was counted at these shapes, times predicted FLOPs over its own.

        Args:
            batch: of the pass; its shapes were counted.
            hit: whether it started from the prefix cache.
        """
        costs, kind = self.adaptive.costs_of(batch), int(hit)
        predicted, counted = self._counts[batch_shapes(batch)]
        flops = costs.cached_step_flops if hit else costs.step_flops
        return {
            "flops": flops,
            "counted_flops": flops * counted[kind] // predicted[kind],
            "full_flops": self.plain_full_flops(batch),
        }

    def plain_full_flops(self, batch: Batch) -> int:
        """FLOPs of full fine-tuning, without adapters, with all logits, at the shapes of this batch."""
        if POSITIONS not in batch and not self._adapted:
            return self.adaptive.costs_of(batch).full_flops
        with cache_paused(self.adaptive), all_logits_meant():
            whole: BudgetOf = "full_finetuning" if self._adapted else "step"
            return self._plain.of(without_positions(batch), whole).budget_whole

    def _checked(self, batch: Batch, predicted: int) -> int:
        return check_step_flops(self._model, batch, predicted, recomputes=self._recomputes)


def measure_steps(
    model: nn.Module,
    batch: Batch,
    counter: PassCounter,
    former: Sequence[Mapping[str, Any]],
    predicted: Mapping[str, Any],
) -> dict[str, Any]:
    """Count and measure a step of a selection, unless one with the same set was measured before.

    Args:
        model: with compiled blocks; trains the selection.
        batch: on the model's device.
        counter: counts.
        former: earlier selections with what this function returned for them.
        predicted: the new selection, with what its steps cost at the shapes of the batch.

    Raises:
        GTCompileError: a prediction is not exact.
    """
    for earlier in former:
        if all(earlier[key] == predicted[key] for key in ("trained", "cached_step_flops")):
            return {key: earlier[key] for key in _ONCE_PER_SET}
    counted = counter.count(batch)
    with cache_paused(counter.adaptive):
        memory = passes_memory(model, batch, next(model.parameters()).device)
    return {
        "counted_step_flops": counted.step_flops,
        "counted_cached_step_flops": counted.cached_step_flops,
        "plain_full_flops": counter.plain_full_flops(batch),
        **memory.as_dict(),
    }


def cache_paused(adaptive: AdaptiveBackprop) -> contextlib.AbstractContextManager[None]:
    """A context in which every block is computed."""
    cache = adaptive.prefix_cache
    return contextlib.nullcontext() if cache is None else cache.paused()


def without_positions(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch without the names of its labelled positions, so that all logits are computed."""
    return {name: tensor for name, tensor in batch.items() if name not in (POSITIONS, TARGETS)}
