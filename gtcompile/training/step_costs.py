"""Costs of training steps at the shapes of their batches, most of them without another capture."""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from gtcompile.capture.model_io import LossFunction, unwrap
from gtcompile.costs.backward_costs import BackwardCosts, SharedWork, backward_costs, costs_of
from gtcompile.costs.batch_shapes import BatchShapes, batch_shapes, combination
from gtcompile.costs.block_costs import forward_flops_inside
from gtcompile.costs.budgets import BudgetOf
from gtcompile.costs.dependency_graph import capture_everything
from gtcompile.costs.full_finetuning import full_finetuning_flops
from gtcompile.costs.prices import SharedAmount
from gtcompile.errors import CaptureError
from gtcompile.importance.gradient_stream import batch_loss, on_device
from gtcompile.prices.saved_values import compiled_parts, saved_values
from gtcompile.state.restore import restored

logger = logging.getLogger(__name__)

MOST_CAPTURES = 32
"""How many shapes are captured of a model whose FLOPs are no polynomial in the sizes of the batch."""
MOST_DERIVED = 256
"""How many shapes' derived costs are kept; to derive them again takes milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """The costs of steps at the shapes of one batch, or the mean of several."""

    costs: BackwardCosts
    """Of the model as it is."""
    whole_flops: int | None
    """FLOPs that the budget is a share of; None for those of a full step."""
    block_flops: tuple[int, ...] = ()
    """FLOPs of the forward of each block that a prefix cache may leave out, in order."""
    saved: tuple[SharedAmount, ...] = ()
    """Bytes saved for the backward; empty unless there is a budget of bytes."""

    @property
    def budget_whole(self) -> int:
        """FLOPs that the budget is a share of."""
        return self.costs.full_flops if self.whole_flops is None else self.whole_flops


def combined(parts: Sequence[tuple[Fraction, StepCosts]]) -> StepCosts | None:
    """Add up costs of one model, each times a factor, and round to whole FLOPs.

    Returns:
        The sum; None if the costs are not of the same parameters.
    """
    (_, first), *others = parts
    if any(each.costs.parameters != first.costs.parameters for _, each in others):
        return None
    works = [{work.parameters: work.flops for work in each.costs.shared_work} for _, each in parts]

    def total(flops_of: Callable[[int], int]) -> int:
        return round(sum((factor * flops_of(i) for i, (factor, _) in enumerate(parts)), Fraction(0)))

    together = {
        needing: total(lambda i, needing=needing: works[i].get(needing, 0))  # type: ignore[misc]
        for needing in sorted(frozenset().union(*works), key=lambda names: (len(names), sorted(names)))
    }
    return StepCosts(
        costs=BackwardCosts(
            parameters=first.costs.parameters,
            forward_flops=total(lambda i: parts[i][1].costs.forward_flops),
            shared_work=tuple(SharedWork(flops, needing) for needing, flops in together.items() if flops),
            follows_values=any(each.costs.follows_values for _, each in parts),
        ),
        whole_flops=None if first.whole_flops is None else total(lambda i: parts[i][1].whole_flops or 0),
        block_flops=tuple(
            total(lambda i, block=block: parts[i][1].block_flops[block])  # type: ignore[misc]
            for block in range(len(first.block_flops))
        ),
        saved=_combined_saved([(factor, each.saved) for factor, each in parts]),
    )


def _combined_saved(parts: Sequence[tuple[Fraction, Sequence[SharedAmount]]]) -> tuple[SharedAmount, ...]:
    """Add up saved bytes, each times a factor, by the parameters that need them."""
    totals: defaultdict[frozenset[str], Fraction] = defaultdict(Fraction)
    for factor, amounts in parts:
        for each in amounts:
            totals[each.parameters] += factor * each.amount
    return tuple(SharedAmount(max(0, round(total)), names) for names, total in totals.items())


def _greatest_saved(parts: Iterable[Sequence[SharedAmount]]) -> tuple[SharedAmount, ...]:
    """The most saved bytes by the parameters that need them: a budget of bytes holds at every step."""
    most: defaultdict[frozenset[str], int] = defaultdict(int)
    for amounts in parts:
        for each in _combined_saved([(Fraction(1), amounts)]):
            most[each.parameters] = max(most[each.parameters], each.amount)
    return tuple(SharedAmount(amount, names) for names, amount in most.items())


@dataclass(slots=True)
class _Family:
    """What is known of the costs at batches of one kind."""

    captured: dict[BatchShapes, StepCosts] = field(default_factory=dict)
    derived: dict[BatchShapes, StepCosts] = field(default_factory=dict)
    """Computed from those that were captured."""
    polynomial: bool = True
    """Whether no capture has contradicted what was derived for its shape."""
    confirmed: bool = False
    """Whether a capture has confirmed what is derived from those that were captured before it."""

    @property
    def follows_values(self) -> bool:
        return any(known.costs.follows_values for known in self.captured.values())


class CostsByShape:
    """Knows the costs of steps at the shapes of any batch.

    The first few shapes are captured. Costs at others are derived from these, since FLOPs are a polynomial in
    the sizes of the batch (`costs/batch_shapes.py`). The first shape whose costs could be derived is captured
    too. If the two differ, nothing is derived any more, and every shape is captured.

    Args:
        model: whose steps they are.
        loss_fn: as for `backward_costs`.
        blocks: FQNs of the blocks that a prefix cache may leave out.
        memory: whether to compute the bytes saved for the backward.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        blocks: Sequence[str] = (),
        *,
        memory: bool = False,
    ) -> None:
        self._model, self._loss_fn, self._blocks, self._memory = model, loss_fn, blocks, memory
        self._families: dict[tuple[BudgetOf, Hashable], _Family] = {}

    def of(self, batch: Any, budget_of: BudgetOf) -> StepCosts:
        """Return the costs at this batch's shapes.

        Raises:
            CaptureError: the model cannot be captured.
        """
        shapes = batch_shapes(batch)
        family = self._families.setdefault((budget_of, shapes.kind), _Family())
        for known in (family.captured, family.derived):
            if shapes in known:
                return known[shapes]
        derived = self._derived(family, shapes)
        if derived is not None and family.confirmed:
            if len(family.derived) >= MOST_DERIVED:
                family.derived.clear()
            family.derived[shapes] = derived
            return derived
        if len(family.captured) >= (1 if family.follows_values else MOST_CAPTURES) and not family.polynomial:
            return self._mean_of_known(family, shapes)
        captured = self._checked_capture(batch, budget_of)
        if derived is not None:
            # saved bytes need not follow: the partitioner may decide otherwise at another shape
            family.confirmed = family.polynomial = replace(captured, saved=derived.saved) == derived
            if not family.polynomial:
                family.derived.clear()
        else:
            family.confirmed = False
        family.captured[shapes] = captured
        return captured

    def may_learn(self, batch: Any) -> bool:
        """Whether costs of this kind of batch are known, or so few kinds that one more may be captured.

        Texts and floating-point numbers in a batch make it one of its own kind.
        """
        kinds = {kind for _, kind in self._families}
        return len(kinds) < MOST_CAPTURES or batch_shapes(batch).kind in kinds

    def mean(self, batches: Iterable[Any], budget_of: BudgetOf) -> StepCosts:
        """Return the mean of the costs at these batches' shapes, rounded to whole FLOPs.

        Saved bytes are the most at any of these shapes.

        Raises:
            CaptureError: the model cannot be captured, or different parameters are used.
        """
        counts: Counter[BatchShapes] = Counter()
        costs: dict[BatchShapes, StepCosts] = {}
        for batch in batches:
            shapes = batch_shapes(batch)
            counts[shapes] += 1
            if shapes not in costs:
                costs[shapes] = self.of(batch, budget_of)
        parts = [(Fraction(counts[shapes], counts.total()), known) for shapes, known in costs.items()]
        if len(parts) == 1:
            return parts[0][1]
        if (mean := combined(parts)) is None:
            raise CaptureError(
                "batches of different shapes use different parameters, so their steps have no mean costs; "
                "give batches of one shape"
            )
        return replace(mean, saved=_greatest_saved(known.saved for known in costs.values()))

    def forget_values(self) -> None:
        """Forget costs that hold for the values of some batch alone.

        Costs of a model that branches on data are kept where they followed from the shapes all the same.
        """
        for family in self._families.values():
            if family.follows_values and not (family.confirmed and family.polynomial):
                family.captured.clear()
                family.derived.clear()

    def run(self, batch: Any) -> torch.Tensor:
        """Run a forward, and return its loss."""
        return batch_loss(self._model, self._moved(batch), self._loss_fn)

    def _derived(self, family: _Family, shapes: BatchShapes) -> StepCosts | None:
        """The costs at a shape as they follow from those at captured shapes; None if they do not."""
        if not (family.polynomial and family.captured):
            return None
        factors = combination(list(family.captured), shapes)
        if factors is None:
            return None
        return combined([(factor, family.captured[known]) for known, factor in factors.items()])

    def _mean_of_known(self, family: _Family, shapes: BatchShapes) -> StepCosts:
        """The mean of the costs at captured shapes, with a warning; kept for this shape."""
        logger.warning(
            "the FLOPs of this model follow more than the sizes of a batch, and %d shapes of batches were "
            "captured: a step at another shape counts as the mean of these; pad batches to fewer lengths",
            len(family.captured),
        )
        share = Fraction(1, len(family.captured))
        mean = combined([(share, known) for known in family.captured.values()])
        family.derived[shapes] = mean or next(iter(family.captured.values()))
        return family.derived[shapes]

    def _checked_capture(self, batch: Any, budget_of: BudgetOf) -> StepCosts:
        try:
            with restored(unwrap(self._model)):
                return self._capture(self._moved(batch), budget_of)
        except CaptureError:
            with torch.no_grad():  # the model's own error about a wrong batch says more
                self.run(batch)
            raise

    def _moved(self, batch: Any) -> Any:
        return on_device(batch, next(self._model.parameters()).device)

    def _capture(self, batch: Any, budget_of: BudgetOf) -> StepCosts:
        logger.info("capturing one training step, for its costs; once for each of a few shapes of batches")
        whole = None
        if budget_of == "full_finetuning":
            whole = full_finetuning_flops(self._model, batch, self._loss_fn)
        if not self._blocks and not self._memory:
            costs = backward_costs(self._model, batch, loss_fn=self._loss_fn)
            return StepCosts(costs=costs, whole_flops=whole)
        joint = capture_everything(self._model, batch, self._loss_fn)
        return StepCosts(
            costs=costs_of(joint),
            whole_flops=whole,
            block_flops=forward_flops_inside(joint, self._blocks),
            saved=saved_values(joint, compiled_parts(self._model)) if self._memory else (),
        )
