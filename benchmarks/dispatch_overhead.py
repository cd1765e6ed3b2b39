"""The time to dispatch one call of a hoisted region, compared with a plain compiled block."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.workloads import Workload
from gtcompile import compile_blocks
from gtcompile.compiler.blocks import find_blocks

CALLS = 2000
"""The fastest of so many calls counts, since other work on the machine only adds time."""
CALLS_PER_TURN = 200
"""Calls of one block before the other block's turn."""
WARM_UP = 5
"""Untimed first calls; removing a hook may make Dynamo check its guards again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTimes:
    """The fastest call of a block that is so small that its arithmetic takes no time."""

    forward_us: float
    """Microseconds."""
    backward_us: float
    """Microseconds, everything trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """One block compiled in two ways."""

    plain: CallTimes
    """The block compiled by `torch.compile`."""
    hoisted: CallTimes
    """The block compiled by `compile_blocks`."""

    @property
    def forward_us(self) -> float:
        """Additional microseconds of a call of the region."""
        return self.hoisted.forward_us - self.plain.forward_us

    @property
    def backward_us(self) -> float:
        """Additional microseconds of its backward, mostly for launching weight gradients one by one."""
        return self.hoisted.backward_us - self.plain.backward_us


def measure_dispatch(workload: Workload, calls: int = CALLS) -> Dispatch:
    """Time calls of a block of the workload's kind at the smallest size; random numbers are generated."""
    tiny = replace(workload, layers=2, hidden=64, vocabulary=64, rows=1, length=4)
    plain, hoisted = tiny.model(), compile_blocks(tiny.model(), random="compiler")
    for name in find_blocks(plain):
        block = plain.get_submodule(name)
        block.forward = torch.compile(block.forward)
    blocks = {name: _call_of(model, tiny) for name, model in (("plain", plain), ("hoisted", hoisted))}
    return Dispatch(**_fastest(blocks, calls))


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of one block with the arguments that its model passes."""

    block: nn.Module
    hidden: torch.Tensor
    others: tuple[object, ...]
    named: Mapping[str, object]

    def input(self) -> torch.Tensor:
        """Hidden states with autograd history, as if eager code had computed them."""
        return self.hidden * 1

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.block(hidden, *self.others, **self.named)
        first: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return first


def _call_of(model: nn.Module, workload: Workload) -> _Call:
    """Record the call of the model's second block; the model compiles the block on the way."""
    given: list[_Call] = []
    block = model.get_submodule(list(find_blocks(model))[1])

    def note(_: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, object]) -> None:
        given.append(_Call(block, args[0].detach().requires_grad_(), args[1:], named))

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    model(**workload.batch()).loss.backward()
    handle.remove()
    return given[0]


def _fastest(blocks: Mapping[str, _Call], calls: int) -> dict[str, CallTimes]:
    """Time the fastest call of each block, the blocks taking turns."""
    for call in blocks.values():
        for _ in range(WARM_UP):
            call(call.input()).sum().backward()
    forward: dict[str, list[float]] = {name: [] for name in blocks}
    backward: dict[str, list[float]] = {name: [] for name in blocks}
    for done in range(0, calls, CALLS_PER_TURN):
        for name, call in blocks.items():
            turn = range(min(CALLS_PER_TURN, calls - done))
            forward[name].append(min(_forward_seconds(call) for _ in turn))
            backward[name].append(min(_backward_seconds(call) for _ in turn))
    return {
        name: CallTimes(forward_us=min(forward[name]) * 1e6, backward_us=min(backward[name]) * 1e6)
        for name in blocks
    }


def _forward_seconds(call: _Call) -> float:
    hidden = call(call.hidden)  # as in a model, where the previous block computes them
    start = time.perf_counter()
    output = call(hidden)
    taken = time.perf_counter() - start
    del output  # freeing the graph is not timed
    return taken


def _backward_seconds(call: _Call) -> float:
    output = call(call.input())
    gradient = torch.ones_like(output)
    start = time.perf_counter()
    output.backward(gradient)
    return time.perf_counter() - start
