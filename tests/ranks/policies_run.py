"""Trains with a policy that changes the set at every step on every rank, under torchrun; ranks must agree.

`torchrun --nproc-per-node 2 -m tests.ranks.policies_run POLICY`, one of `gtcompile.policies` or `own`.
"""

import random
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gtcompile import AdaptiveBackprop, compile_blocks, trained_parameters
from tests.ranks.data_parallel_run import build, draw
from tests.ranks.gloo_ranks import gloo_ranks

STEPS = 20


def own_policy(costs, importance, budget_fraction, generator):
    """Draws from a source that differs by rank: only if one rank decides for all do they agree."""
    names = sorted(costs.fqns)
    return random.Random(f"{dist.get_rank()} {generator.initial_seed()}").sample(names, 3)


def gathered(value):
    """The value of every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main(policy: str) -> None:
    """Train two windows; after each step, sets and weights are equal on all ranks."""
    with gloo_ranks():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        inner = build()
        compile_blocks(inner, compiler="eager")
        model = DistributedDataParallel(inner, find_unused_parameters=True)
        optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
        chosen = own_policy if policy == "own" else policy
        adaptive = AdaptiveBackprop(model, optimizer, 0.7, policy=chosen)
        sets = set()
        for window in range(2):
            adaptive.reselect([draw(window, 90 + i, ranks)[rank] for i in range(2)])
            for step in range(STEPS):
                trained = sorted(trained_parameters(inner))
                assert gathered(trained) == [trained] * ranks, f"other sets in step {step}"
                sets.add(tuple(trained))
                model(**draw(window, step, ranks)[rank]).backward()
                assert sorted(n for n, p in inner.named_parameters() if p.grad is not None) == trained
                optimizer.step()
                optimizer.zero_grad()
                adaptive.step()
            weights = [p.tolist() for p in inner.parameters()]
            assert gathered(weights) == [weights] * ranks, "other weights"
        assert len(sets) > 3, "the set never changed"


if __name__ == "__main__":
    main(sys.argv[1])
