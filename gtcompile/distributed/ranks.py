"""The processes that train one model together: what they agree on, and what they add up."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from gtcompile.errors import GTCompileError

T = TypeVar("T")


class Ranks:
    """The processes that train one model, or this one alone; they agree on what is trained.

    Every method is a collective call: all ranks make it, in the same order.

    Args:
        group: the processes; None for this one alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may fail on every rank; when it fails on one, it fails on all.

        Raises:
            Exception: this rank's own.
            GTCompileError: another rank's, named.
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
                del error  # its traceback holds this frame, which would keep it
        for rank, failure in enumerate(said):
            if failure is not None:
                raise GTCompileError(f"rank {rank} failed, so no rank goes on: {failure}")
        return result

    def agree(self, what: Mapping[str, Any]) -> None:
        """Check that all ranks have the same, by a hash of each entry.

        Args:
            what: JSON types by what they are called in the error.

        Raises:
            ValueError: on all ranks, naming the entry and the ranks that differ from rank 0.
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
                    f"{name} differs between ranks: rank {ranks} has another than rank 0; "
                    f"start all ranks with the same"
                )

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks; when it fails there, it fails on all."""
        if self.group is None:
            return make()
        made = [self.together(lambda: make() if self.rank == 0 else None)]
        dist.broadcast_object_list(made, group=self.group, group_src=0)
        return cast("T", made[0])

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sum over ranks of each value; all ranks have the same names."""
        if self.group is None or not values:
            return dict(values)
        names = sorted(values)
        totals = torch.tensor([values[name] for name in names], dtype=torch.float64)
        totals = totals.to(_device(self.group))
        dist.all_reduce(totals, group=self.group)
        return dict(zip(names, totals.tolist(), strict=True))

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; all ranks have the same names."""
        return {name: value / self.count for name, value in self.total(values).items()}

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend takes tensors from."""
    return torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
