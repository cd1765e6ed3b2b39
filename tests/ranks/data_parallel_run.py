"""Trains a small model on every rank, and alone, under torchrun; fails where they differ.

`torchrun --nproc-per-node 2 -m tests.ranks.data_parallel_run CASE`
"""

import os
import signal
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gtcompile import AdaptiveBackprop, GTCompileError, compile_blocks, train_only, trained_parameters
from gtcompile.testing import assert_same_gradients
from tests.ranks.gloo_ranks import gloo_ranks
from tests.support.models import WIDTH, ResidualMLP, Stack, captures
from tests.training.test_adaptive import make_signed

ROWS, ROUNDS, STEPS = 4, 5, 3


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Stack([ResidualMLP() for _ in range(4)], tied=False)


def draw(round_number: int, step: int, ranks: int) -> list[dict[str, torch.Tensor]]:
    """One batch per rank."""
    generator = torch.Generator().manual_seed(1000 * round_number + step)
    shape = (ROWS, WIDTH)
    return [
        {"x": torch.randn(shape, generator=generator), "y": torch.randn(shape, generator=generator)}
        for _ in range(ranks)
    ]


class SentBytes:
    """Adds up what gradients take on their way, by standing in for `all_reduce`."""

    def __init__(self) -> None:
        self.bytes, self._inner = 0, dist.all_reduce

    def __call__(self, tensor, *args, **kwargs):
        if kwargs.get("async_op"):
            self.bytes += tensor.numel() * tensor.element_size()
        return self._inner(tensor, *args, **kwargs)


def trained_bytes(model: nn.Module) -> int:
    names = trained_parameters(model)
    return sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n in names)


def check_training(*, compiled: str | None, accumulate: int, views: bool) -> None:
    """The same sets and batches in one process: the same weights; frozen ones stay; bytes are counted."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.all_reduce = sent = SentBytes()
    inner = build()
    if compiled:
        compile_blocks(inner, compiler=compiled)
    model = DistributedDataParallel(inner, find_unused_parameters=True, gradient_as_bucket_view=views)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    adaptive = AdaptiveBackprop(model, optimizer, 0.6)
    alone = build()
    alone_optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    sets, first = [], captures()
    for number in range(ROUNDS):
        selection = adaptive.reselect([draw(number, 90 + i, ranks)[rank] for i in range(2)])
        sets.append(selection.trained)
        train_only(alone, selection.trained)
        frozen = {n: p.detach().clone() for n, p in inner.named_parameters() if n not in selection.trained}
        for step in range(STEPS):
            sent.bytes = 0
            for part in range(accumulate):
                batches = draw(number, accumulate * step + part, ranks)
                last = part == accumulate - 1
                with nullcontext() if last else model.no_sync():
                    model(**batches[rank]).backward()
                for batch in batches:
                    (alone(**batch) / ranks).backward()
            assert sent.bytes == trained_bytes(inner), (sent.bytes, trained_bytes(inner))
            expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
            assert_same_gradients(inner, expected, rtol=1e-4, atol=1e-6)
            assert {n for n, p in inner.named_parameters() if p.grad is not None} == selection.trained
            for each in (optimizer, alone_optimizer):
                each.step()
                each.zero_grad()
        for name, value in frozen.items():
            assert torch.equal(inner.get_parameter(name), value), f"the frozen {name} moved"
        if number == 0:
            first = captures()
    assert captures() == first, "a later set captured something"
    assert len(set(sets)) > 1, "every selection was the same"
    for (name, ours), theirs in zip(inner.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


def check_refusal(case: str) -> None:
    """All ranks get the error: the other rank's, or the same."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inner = build()
    if case == "model" and rank == 1:
        inner.top = inner._modules.pop("head")
    wrapped = DistributedDataParallel(inner, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    adaptive = AdaptiveBackprop(wrapped, optimizer, 0.6 if rank or case != "budget" else 0.5)
    batches = [draw(0, i, ranks)[rank] for i in range(2)]
    before = trained_parameters(inner)
    if case == "failure" and rank == 1:
        batches = batches[:1]
    try:
        adaptive.reselect(batches)
    except (GTCompileError, ValueError) as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
    else:
        raise AssertionError("nothing was refused")
    assert trained_parameters(inner) == before


def check_contradiction() -> None:
    """Batches that contradict each other are measured anew, one by one, on all ranks."""
    adaptive, model, plus, minus = make_signed(
        wrap=lambda model: DistributedDataParallel(model, find_unused_parameters=True)
    )
    adaptive.reselect([plus, minus])
    assert trained_parameters(model) == {"layers.1.weight"}
    assert min(adaptive.importance.values()) > 0


def lose_a_rank() -> None:
    """Rank 1 dies in the middle of training; rank 0 must not wait for it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(build(), find_unused_parameters=True)
    adaptive = AdaptiveBackprop(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 0.6)
    adaptive.reselect([draw(0, i, ranks)[rank] for i in range(2)])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    adaptive.reselect([draw(1, i, ranks)[rank] for i in range(2)])
    print("rank 0 is still alive", flush=True)


def run(case: str) -> None:
    """Run one case on this rank."""
    if case in ("budget", "model", "failure"):
        check_refusal(case)
    elif case == "contradiction":
        check_contradiction()
    elif case == "death":
        lose_a_rank()
    else:
        compiled, accumulate, views = case.split("-")
        check_training(
            compiled=None if compiled == "plain" else compiled,
            accumulate=int(accumulate),
            views=views == "views",
        )


if __name__ == "__main__":
    with gloo_ranks():
        for case in sys.argv[1:]:
            run(case)
