"""Data parallel training: one selection for all ranks, and only the trained gradients are sent.

Works on torch's own `DistributedDataParallel`. A communication hook packs the gradients of trained parameters
out of each bucket; what is frozen has no gradient, before and after.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gtcompile.capture import unwrap
from gtcompile.errors import GTCompileError
from gtcompile.trained import is_trained, was_trainable

T = TypeVar("T")


class Ranks:
    """The processes that train one model, or this one alone; they agree on what is trained.

    Every method is a collective call: all ranks make it, in the same order.

    Args:
        group: the processes; None for this one alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._count = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, model: nn.Module) -> "Ranks":
        """The ranks a model is trained on; has `DistributedDataParallel` send trained gradients alone.

        Raises:
            ValueError: for a wrapper that would send or train something else.
        """
        if not isinstance(model, DistributedDataParallel):
            return cls(None)
        prepare(model)
        return cls(model.process_group)

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may fail on every rank; when it fails on one, it fails on all.

        Raises:
            Exception: this rank's own.
            GTCompileError: another rank's, named.
        """
        if self._group is None:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as problem:
            error = problem
        said = self._gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
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
        if self._group is None:
            return
        digests = {name: _digest(value) for name, value in what.items()}
        gathered = self._gather(digests)
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
        if self._group is None:
            return make()
        first = dist.get_rank(self._group) == 0
        made = [self.together(lambda: make() if first else None)]
        dist.broadcast_object_list(made, group=self._group, group_src=0)
        return cast("T", made[0])

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over ranks of each value; all ranks have the same names."""
        if self._group is None or not values:
            return dict(values)
        names = sorted(values)
        total = torch.tensor([values[name] for name in names], dtype=torch.float64)
        total = total.to(_device(self._group))
        dist.all_reduce(total, group=self._group)
        return dict(zip(names, (total / self._count).tolist(), strict=True))

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._count
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered


def prepare(model: DistributedDataParallel) -> None:
    """Have a wrapped model send the gradients of trained parameters alone; a second call does nothing.

    Raises:
        ValueError: for `static_graph=True`, without `find_unused_parameters=True`, with a communication hook
            of the user's, or when a trainable parameter was frozen while the model was wrapped.
    """
    if getattr(model, _PREPARED, False):
        return
    if model.static_graph:
        raise ValueError(
            "static_graph=True fixes at the first step what is trained, and later sets diverge silently; "
            "wrap the model without it"
        )
    if not model.find_unused_parameters:
        raise ValueError(
            "DistributedDataParallel waits for the gradient of every parameter; wrap the model with "
            "find_unused_parameters=True"
        )
    _check_known(model)
    try:
        model.register_comm_hook(model.process_group, send_trained)
    except RuntimeError as error:
        raise ValueError(
            "this DistributedDataParallel has a communication hook already, and takes no second one; "
            "wrap the model without it"
        ) from error
    setattr(model, _PREPARED, True)


_PREPARED = "_sends_trained_gradients"


def send_trained(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined] # missing in the stubs
) -> torch.futures.Future[torch.Tensor]:
    """Average the trained gradients of a bucket over the ranks; the hook of `register_comm_hook`.

    Args:
        group: the processes.
        bucket: gradients as views of one flat buffer; frozen parameters' are left as they are.
    """
    buffer: torch.Tensor = bucket.buffer()
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    chosen = [gradient for parameter, gradient in pairs if is_trained(parameter)]
    if not chosen:
        nothing: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        nothing.set_result(buffer)
        return nothing
    packed = torch.cat([gradient.flatten() for gradient in chosen])
    packed.div_(group.size())
    work: Any = dist.all_reduce(packed, group=group, async_op=True)

    def unpack(_: object) -> torch.Tensor:
        for gradient, mean in zip(chosen, packed.split([g.numel() for g in chosen]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        return buffer

    return cast("torch.futures.Future[torch.Tensor]", work.get_future().then(unpack))


def _check_known(model: DistributedDataParallel) -> None:
    """Refuse parameters that the wrapper does not synchronise because they were frozen when it was made."""
    trainable = sum(was_trainable(parameter) for parameter in unwrap(model).parameters())
    known: int = model._get_ddp_logging_data()["num_parameter_tensors"]
    if known < trainable:
        raise ValueError(
            f"{trainable - known} of {trainable} trainable parameters were frozen when the model was put in "
            f"DistributedDataParallel, and ranks would diverge once they are trained; wrap the model first, "
            f"then call train_only"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend takes tensors from."""
    return torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
