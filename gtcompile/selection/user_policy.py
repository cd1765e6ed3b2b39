"""A user's own policy function, called for the set of every step and held to the terms of the selection."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from gtcompile.distributed.ranks import Ranks
from gtcompile.graph.names import match_patterns
from gtcompile.selection.limits import Terms, step_budget_fraction
from gtcompile.selection.policies import Function, Policy

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts

Propose = Callable[["BackwardCosts", torch.Generator], frozenset[str]]
"""Takes the costs and a generator, and returns the set of the coming step."""


def proposer(
    policy: Policy, terms: Terms, importance: Mapping[str, float], whole_flops: int, ranks: Ranks
) -> Propose | None:
    """Wrap the user's own policy for a schedule; None for any other policy.

    Args:
        policy: any policy.
        terms: `always` is added to what the function returns, and `never` taken away.
        importance: by FQN, for the function.
        whole_flops: FLOPs that the budget is a share of.
        ranks: the first one calls the function and decides for all.
    """
    if not isinstance(policy, Function):
        return None
    choose = policy.choose

    def chosen(costs: "BackwardCosts", generator: torch.Generator) -> frozenset[str]:
        always, never = (match_patterns(costs.names, each) for each in (terms.always, terms.never))
        budget = step_budget_fraction(costs, terms, whole_flops)
        names = match_patterns(costs.names, choose(costs, importance, budget, generator))
        if not (trained := (names | always) - never):
            raise ValueError("your policy returned no parameter to train; expected at least one FQN")
        return trained

    return lambda costs, generator: ranks.from_first(lambda: chosen(costs, generator))
