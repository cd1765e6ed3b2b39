"""The processes that train one model together: collective calls on Python values."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from gtcompile.errors import GTCompileError

T = TypeVar("T")


class Ranks:
    """The processes that train one model, or this process alone.

    Every method is a collective call: all ranks must make the same calls in the same order.

    Args:
        group: the processes; None for this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def together(self, work: Callable[[], T]) -> T:
        """Run work that may fail. If it fails on one rank, every rank raises.

        Raises:
            Exception: the error of `work` on this rank.
            GTCompileError: `work` failed on another rank; the message names the rank and its error.
        """
        if self.group is None:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as problem:
            error = problem
        said = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame, which would keep the error alive
        for rank, failure in enumerate(said):
            if failure is not None:
                raise GTCompileError(f"rank {rank} failed, so all ranks stop: {failure}")
        return result

    def agree(self, what: Mapping[str, Any]) -> None:
        """Check that all ranks have the same values; only hashes are sent.

        Args:
            what: values of JSON types, by the name to use in the error.

        Raises:
            ValueError: values differ, raised on all ranks; the message names the value and the ranks.
        """
        if self.group is None:
            return
        digests = {name: _digest(value) for name, value in what.items()}
        gathered = self.gather(digests)
        for name in what:
            differing = [rank for rank, theirs in enumerate(gathered) if theirs[name] != gathered[0][name]]
            if differing:
                ranks = ", ".join(map(str, differing))
                raise ValueError(
                    f"{name} differs between ranks: rank {ranks} has another value than rank 0; "
                    f"start all ranks with the same value"
                )

    def from_first(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0, and return its result on all ranks. If it fails, every rank raises."""
        if self.group is None:
            return make()
        made = [self.together(lambda: make() if self.rank == 0 else None)]
        dist.broadcast_object_list(made, group=self.group, group_src=0)
        return cast("T", made[0])

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the sum of each value over the ranks. All ranks must pass the same names."""
        if self.group is None or not values:
            return dict(values)
        names = sorted(values)
        totals = torch.tensor([values[name] for name in names], dtype=torch.float64)
        totals = totals.to(_device(self.group))
        dist.all_reduce(totals, group=self.group)
        return dict(zip(names, totals.tolist(), strict=True))

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each value over the ranks. All ranks must pass the same names."""
        return {name: value / self.count for name, value in self.total(values).items()}

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _device(group: dist.ProcessGroup) -> torch.device:
    """Return the device of the tensors that the group's backend can send."""
    return torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
