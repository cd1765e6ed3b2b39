"""Policies decide which parameters each step trains within a budget. Public as `gtcompile.policies`.

A policy is given to `AdaptiveBackprop(..., policy=...)` by name (`"sampled"`), as a description
(`policies.Sampled(exploration=0.5)`), or as your own function. Some policies train one set until
the next selection. Others change the set at every step; the budget is then a mean that holds after every
step: cheap steps save FLOPs for costly ones. With `Progressive`, costly steps come first, and the mean holds
at the end.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, cast

import torch

from gtcompile.graph.names import near_names
from gtcompile.selection.blocks import (
    blocks_of,
    fill,
    from_the_output,
    growing_sets,
    last_layers,
    weighted_order,
)
from gtcompile.selection.limits import Limits, Terms, flops_with_each, restricted
from gtcompile.selection.paper import chain_costs, select_by_paper
from gtcompile.selection.prefix_choice import choose_prefix
from gtcompile.selection.schedule import Plan, steps_of_falling_cost
from gtcompile.selection.selection import select_within

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts

__all__ = [
    "NAMES",
    "Best",
    "Function",
    "LastLayers",
    "Lisa",
    "OccasionallyFull",
    "Paper",
    "Policy",
    "Progressive",
    "Random",
    "Rotating",
    "Sampled",
    "check_holds",
    "find_policy",
    "for_training",
]

Measured = Literal["affordable", "everything", "nothing"]
"""The importances that a policy needs: of parameters that a step can afford, of every parameter, or none."""
Choose = Callable[["BackwardCosts", Mapping[str, float], float, torch.Generator], Iterable[str]]
"""A user's policy function: takes costs, importance by FQN, the budget as a share of a full step's FLOPs in
(0, 1], and a generator on the CPU seeded for this step; returns the FQNs to train in it."""

_DRAWN = 16
"""How many random sets are drawn at a selection; steps then choose among them."""
_SHALLOW = 1 / 3
"""Cost of a shallow step, as a share of the way from the cheapest step to the budget. A costlier step learns
more and saves less for the others."""


_STEPS_UNKNOWN = (
    "this policy must know for how many optimizer steps the model is trained: "
    "policy=gtcompile.policies.Progressive(steps=...)"
)


class Policy(Protocol):
    """A frozen description of what to train, from which a plan is drawn at every selection."""

    measured: ClassVar[Measured]
    two_pass: ClassVar[bool]
    """Whether importance is measured as the paper does, see `measure_importance`."""

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """The sets to train until the next selection.

        Args:
            limits: costs, the budget, and what is trained always or never.
            importance: by FQN; of the parameters that `measured` names and that are not in `always`.
            generator: on the CPU; equal generators lead to equal plans.
        """


@dataclass(frozen=True, slots=True)
class Best:
    """The most important parameters that fit the budget, proven to be the best: one set for every step."""

    measured: ClassVar[Measured] = "affordable"
    two_pass: ClassVar[bool] = False

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """One set: the optimum of `select_parameters`, or that of `choose_prefix` with a prefix cache."""
        if limits.prefix is None:
            selection = select_within(limits, importance)
            return Plan(sets=(selection.trained,), shallow=_shallow(limits), selection=selection)
        selection = choose_prefix(limits, importance)
        frozen = limits.prefix.inside(selection.kept_blocks)
        return Plan(
            sets=(selection.trained,),
            shallow=_shallow(_outside(limits, frozen, selection.saved_flops)),
            selection=selection,
            kept_blocks=selection.kept_blocks,
            saved_flops=selection.saved_flops,
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """Sets drawn by importance, another one at every step.

    The first parameter of a set decides how deep the backward of the step reaches. It is drawn in proportion
    to its importance or, with probability `exploration`, uniformly, so that deep blocks are also trained when
    their importance is low. If the budget pays for the first parameter, the set is filled up to the budget.
    Otherwise it is filled up to a cost drawn between that of its first parameter and that of a full step.
    """

    exploration: float = 0.3
    """Share of the draws that ignore importance, in (0, 1]."""
    measured: ClassVar[Measured] = "everything"
    two_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.exploration <= 1:
            raise ValueError(f"expected an exploration in (0, 1], got {self.exploration!r}")

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """Sets drawn now, of which each step takes one at random."""
        weights = self._weights(limits, importance)
        sets = [self._draw(limits, weights, generator) for _ in range(_DRAWN)]
        return Plan(sets=tuple(sets), shallow=_shallow(limits), at_random=True)

    def _weights(self, limits: Limits, importance: Mapping[str, float]) -> dict[str, float]:
        fqns = sorted(limits.trainable - limits.always)
        gains = {fqn: max(importance.get(fqn, 0.0), 0.0) for fqn in fqns}
        total = math.fsum(gains.values())
        explored = self.exploration if total else 1.0
        uniform = explored / len(fqns) if fqns else 0.0
        return {
            fqn: uniform + (1 - explored) * (gain / total if total else 0.0) for fqn, gain in gains.items()
        }

    def _draw(
        self, limits: Limits, weights: Mapping[str, float], generator: torch.Generator
    ) -> frozenset[str]:
        order = weighted_order(weights, _uniform(weights, generator))
        least = limits.costs.step_flops(limits.always.union(order[:1]))
        limit = limits.budget_flops
        if least > limit:
            share = float(torch.rand((), generator=generator))
            limit = least + int(share * (limits.costs.full_flops - least))
        return fill(limits.costs, order, limit, limits.always)


@dataclass(frozen=True, slots=True)
class LastLayers:
    """The blocks nearest the output that fit the budget: what freezing by hand does."""

    measured: ClassVar[Measured] = "nothing"
    two_pass: ClassVar[bool] = False

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """One set: whole blocks, and what still fits of the next one."""
        trained = last_layers(limits.costs, limits.trainable, limits.budget_flops, limits.always)
        return _one_set(limits, trained)


@dataclass(frozen=True, slots=True)
class Random:
    """Random sets within the budget, another one at every step; a baseline for comparisons."""

    measured: ClassVar[Measured] = "nothing"
    two_pass: ClassVar[bool] = False

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """Sets drawn now, of which each step takes one at random."""
        fqns = sorted(limits.trainable)
        sets = []
        for _ in range(_DRAWN):
            order = [fqns[i] for i in torch.randperm(len(fqns), generator=generator)]
            sets.append(fill(limits.costs, order, limits.budget_flops, limits.always))
        return Plan(sets=tuple(sets), shallow=_shallow(limits), at_random=True)


@dataclass(frozen=True, slots=True)
class Rotating:
    """One block at a time, from the output to the input and again, as BAdam (NeurIPS 2024) does.

    Parameters outside of blocks, such as embeddings, take turns like blocks.
    """

    steps: int = 1
    """How many steps in a row train a block."""
    measured: ClassVar[Measured] = "nothing"
    two_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"expected at least 1 step per block, got {self.steps!r}")

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """Every block in turn."""
        blocks = from_the_output(limits.costs, limits.trainable)
        sets = [limits.always | block for block in blocks for _ in range(self.steps)]
        return Plan(sets=tuple(sets), shallow=_shallow(limits))


@dataclass(frozen=True, slots=True)
class Lisa:
    """A few random blocks with all parameters outside of blocks, as LISA (NeurIPS 2024) does.

    LISA itself has no budget; here its steps wait until cheaper ones have saved what they cost.
    """

    blocks: int = 2
    """How many blocks a step trains."""
    measured: ClassVar[Measured] = "nothing"
    two_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"expected at least 1 block, got {self.blocks!r}")

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """Sets drawn now, of which each step takes one at random."""
        fqns = limits.trainable
        blocks = list(blocks_of(sorted(fqns)).values())
        rest = limits.always | fqns.difference(*blocks)
        sets = []
        for _ in range(_DRAWN):
            chosen = torch.randperm(len(blocks), generator=generator)[: self.blocks]
            sets.append(rest.union(*(blocks[i] for i in chosen)))
        return Plan(sets=tuple(sets), shallow=_shallow(limits), at_random=True)


@dataclass(frozen=True, slots=True)
class OccasionallyFull:
    """The last layers at most steps; at random steps everything, as often as the budget pays for it."""

    measured: ClassVar[Measured] = "nothing"
    two_pass: ClassVar[bool] = False

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """Everything, while shallow steps save the FLOPs for it."""
        return _one_set(limits, limits.trainable)


@dataclass(frozen=True, slots=True)
class Progressive:
    """Everything at first, then fewer and fewer of the last layers: blocks freeze from the input on.

    FreezeOut (Brock et al., 2017) freezes in this order too. Here the budget decides how long each block is
    trained: the cost of a step falls in a straight line, and its mean over `steps` steps is at most the
    budget. Before the last of them it may be above. This suits a learning rate that decays: the blocks
    near the input are trained while it is high.
    """

    steps: int | None = None
    """Optimizer steps of the whole training; None where a trainer knows it."""
    measured: ClassVar[Measured] = "nothing"
    two_pass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"expected at least 1 step, got {self.steps!r}")

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """A set for every step of the training.

        Raises:
            ValueError: `steps` is None.
        """
        if self.steps is None:
            raise ValueError(_STEPS_UNKNOWN)
        costs = limits.costs
        cheapest = last_layers(costs, limits.trainable, limits.cheapest_flops, limits.always)
        sets = growing_sets(costs, limits.trainable, cheapest)
        lasts = steps_of_falling_cost(
            [costs.step_flops(each) for each in sets], self.steps, limits.budget_flops * self.steps
        )
        used = [(each, steps) for each, steps in zip(sets, lasts, strict=True) if steps]
        return Plan(
            sets=tuple(each for each, _ in reversed(used)),
            lasts=tuple(steps for _, steps in reversed(used)),
            shallow=_shallow(limits),
        )


@dataclass(frozen=True, slots=True)
class Paper:
    """GreenTrainer's own estimator and dynamic programme (ICLR 2024), for comparisons.

    Its set often costs more than the budget. Then some steps train the shallow set, so that the mean holds.
    """

    measured: ClassVar[Measured] = "everything"
    two_pass: ClassVar[bool] = True

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """One set: that of the paper's dynamic programme on a chain of tensors."""
        costs, chain = limits.costs, chain_costs(limits.costs)
        # The paper has no `never`. Importance 0 makes these parameters the least likely to be chosen.
        worth = [0.0 if fqn in limits.never else importance.get(fqn, 0.0) for fqn in chain.fqns]
        backward = limits.budget_flops - costs.forward_flops
        indices = select_by_paper(chain.weight_flops, chain.activation_flops, worth, backward)
        trained = frozenset(chain.fqns[index] for index in indices) - limits.never
        return _one_set(limits, limits.always | trained)


@dataclass(frozen=True, slots=True)
class Function:
    """A user's policy function, called for every step; see `Choose`."""

    choose: Choose
    measured: ClassVar[Measured] = "everything"
    two_pass: ClassVar[bool] = False

    def plan(self, limits: Limits, importance: Mapping[str, float], generator: torch.Generator) -> Plan:
        """No set yet: the function is called at every step."""
        return Plan(sets=(), shallow=_shallow(limits))

    def __repr__(self) -> str:
        return f"Function({getattr(self.choose, '__qualname__', type(self.choose).__name__)})"


NAMES: Mapping[str, Policy] = {
    "best": Best(),
    "sampled": Sampled(),
    "last_layers": LastLayers(),
    "random": Random(),
    "rotating": Rotating(),
    "lisa": Lisa(),
    "occasionally_full": OccasionallyFull(),
    "progressive": Progressive(),
    "paper": Paper(),
}
"""The policies that can be given by name."""


def find_policy(policy: "str | Policy | Choose") -> Policy:
    """Return the policy for a name, a description or a function.

    Raises:
        ValueError: there is no policy of this name; lists all names.
        TypeError: for something else.
    """
    if isinstance(policy, str):
        if policy not in NAMES:
            raise ValueError(
                f"there is no policy {policy!r}; {near_names(policy, NAMES)}; all: {', '.join(NAMES)}"
            )
        return NAMES[policy]
    if not isinstance(policy, type) and hasattr(policy, "plan"):
        return cast("Policy", policy)
    if callable(policy) and not isinstance(policy, type):
        return Function(policy)
    raise TypeError(
        f"expected the name of a policy ({', '.join(NAMES)}), one of gtcompile.policies, or a function "
        f"(costs, importance, budget_fraction, generator) -> FQNs; got {policy!r}"
    )


def check_holds(policy: Policy, terms: Terms) -> None:
    """Refuse a policy that cannot hold a budget in seconds or bytes.

    Only `Best` solves for several budgets. The other policies keep a mean of FLOPs, and a mean of bytes would
    not fit a memory.

    Raises:
        ValueError: there is such a budget, and another policy.
    """
    if terms.needs_prices and not isinstance(policy, Best):
        name = next((name for name, known in NAMES.items() if known == policy), repr(policy))
        raise ValueError(
            f'budget_seconds and budget_memory hold with policy="best" alone, got the policy {name!r}; leave '
            f"them out, or use that policy"
        )


def for_training(policy: Policy, steps: int | None) -> Policy:
    """Return the policy for a training of so many optimizer steps; None if nobody knows how many.

    Raises:
        ValueError: the policy must know it.
    """
    if not isinstance(policy, Progressive) or policy.steps is not None:
        return policy
    if steps is None:
        raise ValueError(_STEPS_UNKNOWN)
    return replace(policy, steps=steps)


def _one_set(limits: Limits, trained: frozenset[str]) -> Plan:
    return Plan(sets=(trained,), shallow=_shallow(limits))


def _shallow(limits: Limits) -> frozenset[str]:
    """The last layers within a limit between the cheapest step and the budget; see `_SHALLOW`."""
    least = limits.cheapest_flops
    limit = least + int(_SHALLOW * (limits.budget_flops - least))
    return last_layers(limits.costs, limits.trainable, limit, limits.always)


def _outside(limits: Limits, frozen: frozenset[str], saved_flops: int) -> Limits:
    """Limits outside of kept blocks, where the cheapest step may need what leaving these out saves."""
    outside = restricted(limits, frozen, saved_flops)
    each = flops_with_each(limits.costs, outside.undecided, limits.always)
    least = limits.cheapest_flops if limits.always else min(each.values(), default=limits.cheapest_flops)
    return replace(outside, cheapest_flops=least, budget_flops=max(limits.budget_flops, least))


def _uniform(names: Iterable[str], generator: torch.Generator) -> dict[str, float]:
    """A random number in (0, 1] per name."""
    return {name: 1 - float(torch.rand((), generator=generator)) for name in names}
