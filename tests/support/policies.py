"""Costs and models for tests of policies."""

import torch

from gtcompile import BackwardCosts
from gtcompile.costs.backward_costs import SharedWork
from gtcompile.graph.joint_graph import Parameter


def chain_of_blocks(blocks: int, weights: int = 2, flops: int = 10, embedding: bool = True) -> BackwardCosts:
    """A chain as a transformer's: the deeper a trained block, the more activation gradients it needs.

    Args:
        blocks: named `layers.0` to `layers.N`, the last one nearest the output.
        weights: parameters in a block, each with a weight gradient of its own.
        flops: of a weight gradient, and of an activation gradient of a weight.
        embedding: whether there is a parameter below the blocks and one above.
    """
    names, works = [], []
    below: set[str] = {"embed.weight"} if embedding else set()
    for block in range(blocks):
        own = [f"layers.{block}.{weight}" for weight in range(weights)]
        names += own
        works += [SharedWork(flops, frozenset({name})) for name in own]
        if below:
            works.append(SharedWork(flops * weights, frozenset(below)))
        below |= set(own)
    if embedding:
        names = ["embed.weight", *names, "norm.weight"]
        works += [SharedWork(flops, frozenset({"embed.weight"})), SharedWork(1, frozenset({"norm.weight"}))]
        works.append(SharedWork(flops, frozenset(below)))
    parameters = tuple(Parameter(fqn=name, shape=(2,), dtype=torch.float32) for name in names)
    forward = sum(work.flops for work in works) // 2
    return BackwardCosts(parameters=parameters, forward_flops=forward, shared_work=tuple(works))
