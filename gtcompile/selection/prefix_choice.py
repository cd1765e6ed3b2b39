"""Weigh "keep the prefix unchanged" against "train deeper now", over the epochs that remain.

Keeping n blocks adds the FLOPs of their forward to the budget and forbids to train in them: one more knapsack
for each n. If the cache holds these blocks already, the coming epoch has that budget too. If not, the coming
epoch fills the cache, within the budget of steps that compute everything. The total importance of a choice is
that of the coming epoch, and for every further one that of the best set that keeps the same blocks.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from gtcompile.selection.limits import Limits, restricted
from gtcompile.selection.selection import (
    Selection,
    check_importance,
    comparable,
    everything_fits,
    importance_bound,
    optimum,
)

_TOLERANCE = 1e-6
"""Of the solver, as a share of all importances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """One choice of the blocks to keep."""

    kept: int
    """How many."""
    saved: int
    """FLOPs that this saves in the coming epoch, as the mean of its steps."""
    now: Limits
    """Of the coming epoch."""
    later: Limits
    """Of each one after it."""


def choose_prefix(limits: Limits, importance: Mapping[str, float]) -> Selection:
    """Choose the blocks to keep, and the set of the coming epoch, for the greatest total importance.

    Importances count as if they stayed the same until the end. Costs are exact, and the optimum is proven as
    in `select_within`: a choice is left out only if a bound shows that it is no better.

    Args:
        limits: with `prefix`.
        importance: by FQN, of `limits.to_measure`.

    Returns:
        The set of the coming epoch, with the blocks that it keeps. It is empty only if nothing that the
        coming epoch can train has a positive importance, whatever is kept.

    Raises:
        ValueError: an importance missing, not finite, or of no selectable parameter.
    """
    check_importance(limits, importance)
    importance, epochs = comparable(limits, importance), limits.cached_prefix.epochs
    plain = optimum(limits, importance)
    if everything_fits(limits):
        return _described(limits, plain, plain, _option(limits, 0, held=False))
    known = [(0, plain)]
    """Optima of the coming epoch within the plain budget, by the blocks that they may not train."""
    tolerance = _TOLERANCE * sum(map(abs, importance.values()))
    best: tuple[tuple[float, bool, int], Selection] | None = None
    bound = -math.inf
    bounded = sorted(
        ((_bound(option, importance, epochs, plain), option) for option in _options(limits)),
        key=lambda pair: (-pair[0], -pair[1].kept),
    )
    for most, option in bounded:
        if best is not None and most + tolerance < best[0][0]:
            break
        now = _optimum_now(option, importance, known)
        if not now.trained:
            continue
        later = optimum(option.later, importance) if epochs > 1 else now
        found = _described(limits, now, later, option)
        assert found.planned_importance is not None
        assert found.planned_bound is not None
        bound = max(bound, found.planned_bound)
        rank = found.planned_importance, option.saved > 0, option.kept
        if best is None or rank > best[0]:
            best = rank, found
    if best is None:
        return _described(limits, plain, plain, _option(limits, 0, held=False))
    return replace(best[1], planned_bound=bound)


def _options(limits: Limits) -> Iterator[_Option]:
    """Every number of blocks to keep; twice that which the cache holds: with its values, and filled anew."""
    prefix = limits.cached_prefix
    if 0 < prefix.held <= prefix.most_blocks(limits.always):
        yield _option(limits, prefix.held, held=True)
    most = prefix.most_blocks(limits.always) if prefix.epochs > 1 else 0
    yield from (_option(limits, kept, held=False) for kept in range(most + 1))


def _option(limits: Limits, kept: int, *, held: bool) -> _Option:
    prefix = limits.cached_prefix
    frozen = prefix.inside(kept)

    def saved_by(hits: Fraction) -> int:
        return int(hits * prefix.saved_flops(kept))

    saved = saved_by(prefix.hits) if held else 0
    return _Option(
        kept=kept,
        saved=saved,
        now=restricted(limits, frozen, saved),
        later=restricted(limits, frozen, saved_by(prefix.later_hits)),
    )


def _bound(option: _Option, importance: Mapping[str, float], epochs: int, plain: Selection) -> float:
    """More than an option's total importance can be."""
    now = plain.importance_bound if not option.saved else None
    if now is None:
        now = importance_bound(option.now, importance)
    return now + ((epochs - 1) * importance_bound(option.later, importance) if epochs > 1 else 0.0)


def _optimum_now(
    option: _Option, importance: Mapping[str, float], known: list[tuple[int, Selection]]
) -> Selection:
    """The best set of the coming epoch; one that is known if it is the best under a weaker restriction."""
    if option.saved:
        return optimum(option.now, importance)
    for kept, selection in known:
        if kept <= option.kept and selection.trained.isdisjoint(option.now.never):
            return selection
    known.append((option.kept, optimum(option.now, importance)))
    return known[-1][1]


def _described(limits: Limits, now: Selection, later: Selection, option: _Option) -> Selection:
    """The selection of an option, with what the prefix saves."""
    prefix = limits.cached_prefix
    more = prefix.epochs - 1
    assert now.importance_bound is not None
    assert later.importance_bound is not None
    # nothing is weighed in the last epoch, so the cache may keep all that its set leaves unchanged
    kept = option.kept if more or option.saved else prefix.most_blocks(now.trained)
    return replace(
        now,
        step_flops=now.step_flops - option.saved,
        budget_flops=limits.budget_flops,
        kept_blocks=kept,
        saved_flops=option.saved,
        planned_epochs=prefix.epochs,
        planned_importance=now.importance + more * later.importance,
        planned_bound=now.importance_bound + more * later.importance_bound,
    )
