"""The blocks of a model by the names of its parameters, and sets filled up to a cost."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts

_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")
"""A name up to its first number: `model.layers.12` of `model.layers.12.mlp.up_proj.weight`."""


def blocks_of(fqns: Iterable[str]) -> dict[str, frozenset[str]]:
    """Group parameters by the name of their repeated block; those outside of blocks are left out.

    >>> blocks_of(["embed.weight", "layers.0.w", "layers.1.w"])
    {'layers.0': frozenset({'layers.0.w'}), 'layers.1': frozenset({'layers.1.w'})}
    """
    blocks: dict[str, set[str]] = {}
    for fqn in fqns:
        if block := _BLOCK.match(fqn):
            blocks.setdefault(block.group(), set()).add(fqn)
    return {name: frozenset(members) for name, members in blocks.items()}


def from_the_output(costs: "BackwardCosts", fqns: frozenset[str]) -> list[frozenset[str]]:
    """Sort the blocks, and each parameter outside of blocks, from the model's output to its input.

    The closer a block is to the output, the less a step costs that trains it alone: the backward ends there.
    """
    blocks = list(blocks_of(sorted(fqns)).values())
    alone = [frozenset({fqn}) for fqn in sorted(fqns.difference(*blocks))]
    return sorted([*blocks, *alone], key=costs.step_flops)


def last_layers(
    costs: "BackwardCosts", fqns: frozenset[str], limit: int, given: frozenset[str]
) -> frozenset[str]:
    """Select whole blocks from the output on while they fit the limit, then what fits of the next block.

    If nothing of the block nearest the output fits, select the cheapest parameters of the model.

    Args:
        costs: what each set costs.
        fqns: parameters that may be trained.
        limit: FLOPs of a step.
        given: trained in any case.
    """
    taken = given
    for block in from_the_output(costs, fqns):
        if costs.step_flops(taken | block) > limit:
            taken = fill(costs, sorted(block), limit, taken)
            break
        taken |= block
    return taken or fill(costs, sorted(fqns, key=lambda fqn: costs.step_flops({fqn})), limit, given)


def growing_sets(costs: "BackwardCosts", fqns: frozenset[str], first: frozenset[str]) -> list[frozenset[str]]:
    """List `first`, then with one block more at a time, from the output to the input; each costs more.

    Args:
        costs: what each set costs.
        fqns: parameters that may be trained; all of them are in the last set.
        first: the first set.
    """
    sets, taken = [first], first
    for block in from_the_output(costs, fqns):
        taken |= block
        if costs.step_flops(taken) > costs.step_flops(sets[-1]):
            sets.append(taken)
        else:
            sets[-1] = taken
    return sets


def fill(costs: "BackwardCosts", order: Iterable[str], limit: int, given: frozenset[str]) -> frozenset[str]:
    """Add parameters to `given`, in this order, each if it still fits the limit.

    Args:
        costs: what each set costs.
        order: FQNs.
        limit: FLOPs of a step.
        given: trained in any case.
    """
    taken, spent = set(given), costs.step_flops(given)
    undone = [work for work in costs.shared_work if work.parameters.isdisjoint(given)]
    for fqn in order:
        spent_then = spent + sum(work.flops for work in undone if fqn in work.parameters)
        if spent_then <= limit:
            taken.add(fqn)
            spent = spent_then
            undone = [work for work in undone if fqn not in work.parameters]
    return frozenset(taken)


def weighted_order(weights: Mapping[str, float], uniform: Mapping[str, float]) -> list[str]:
    """Order names as if they were drawn by weight, without replacement.

    Args:
        weights: positive; a name is drawn first with probability in proportion to its weight.
        uniform: a random number in (0, 1] per name.
    """
    # u ** (1 / w) decides (Efraimidis and Spirakis, 2006); its logarithm does not underflow for small weights
    return sorted(weights, key=lambda name: math.log(uniform[name]) / weights[name], reverse=True)
