"""The blocks of a model by the names of its parameters, and sets filled up to a cost."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gtcompile.costs.backward_costs import BackwardCosts

_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")
"""A name up to its first number: `model.layers.12` of `model.layers.12.mlp.up_proj.weight`."""


def blocks_of(fqns: Iterable[str]) -> dict[str, frozenset[str]]:
    """The parameters of each repeated block, by the block's name. Those outside of blocks are left out.

    >>> blocks_of(["embed.weight", "layers.0.w", "layers.1.w"])
    {'layers.0': frozenset({'layers.0.w'}), 'layers.1': frozenset({'layers.1.w'})}
    """
    blocks: dict[str, set[str]] = {}
    for fqn in fqns:
        if block := _BLOCK.match(fqn):
            blocks.setdefault(block.group(), set()).add(fqn)
    return {name: frozenset(members) for name, members in blocks.items()}


def from_the_output(costs: "BackwardCosts", fqns: frozenset[str]) -> list[frozenset[str]]:
    """The blocks, and each parameter outside of them, from the output of the model to its input.

    The closer to the output, the less a step costs that trains the block alone: the backward ends there.
    """
    blocks = list(blocks_of(sorted(fqns)).values())
    alone = [frozenset({fqn}) for fqn in sorted(fqns.difference(*blocks))]
    return sorted([*blocks, *alone], key=costs.step_flops)


def last_layers(
    costs: "BackwardCosts", fqns: frozenset[str], limit: int, given: frozenset[str]
) -> frozenset[str]:
    """As many whole blocks from the output on as a step may cost, and what fits of the next one.

    If nothing fits of the block nearest the output, the cheapest parameters of the model.

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


def fill(costs: "BackwardCosts", order: Iterable[str], limit: int, given: frozenset[str]) -> frozenset[str]:
    """Go through the parameters in this order and train each that still fits.

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


def drawing_keys(weights: Mapping[str, float], uniform: Mapping[str, float]) -> list[str]:
    """The names in the order in which they would be drawn without replacement, by weight.

    Args:
        weights: positive; a name is drawn first with probability in proportion to its weight.
        uniform: a random number in (0, 1) per name.
    """
    return sorted(weights, key=lambda name: -(uniform[name] ** (1 / weights[name])))
