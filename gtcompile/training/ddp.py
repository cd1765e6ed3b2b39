"""Data parallel training: one selection for all ranks, and only the trained gradients are sent.

In `DistributedDataParallel` a communication hook takes the gradients of the trained parameters out of each
bucket and sends only those. `fully_shard` needs no hook: it sends only gradients that exist (`fsdp.py`).
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from gtcompile.capture.model_io import unwrap
from gtcompile.distributed import fsdp
from gtcompile.distributed.ranks import Ranks
from gtcompile.state.trained_set import is_trained, was_trainable

_PREPARED = "_sends_trained_gradients"
"""Attribute of a wrapped model that has the hook."""


def ranks_of(model: nn.Module) -> Ranks:
    """Return the ranks that train a model; make `DistributedDataParallel` send only trained gradients.

    Raises:
        ValueError: for a wrapper that would send or train something else, or with NCCL a current CUDA device
            that is not the model's.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel (version 1) flattens the parameters of a module into one, while they "
            "are selected one by one; shard the model with torch.distributed.fsdp.fully_shard"
        )
    group: dist.ProcessGroup | None
    if isinstance(model, DistributedDataParallel):
        prepare(model)
        group = model.process_group
    else:
        group = fsdp.group_of(unwrap(model))
    if group is not None and dist.get_backend(group) == "nccl":
        check_current_device(model)
    return Ranks(group)


def check_current_device(model: nn.Module) -> None:
    """Refuse a model on another CUDA device than the current one, from which NCCL sends Python values.

    Raises:
        ValueError: says which device to set.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    current = torch.device("cuda", torch.cuda.current_device()) if devices else None
    if devices and current not in devices:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"this rank's model is on {found}, and its current CUDA device is {current}, which another rank "
            f"may use: call torch.cuda.set_device with the model's device before init_process_group"
        )


def prepare(model: DistributedDataParallel) -> None:
    """Make a wrapped model send only the gradients of trained parameters; a second call does nothing.

    Raises:
        ValueError: the wrapper was made with `static_graph=True` or without `find_unused_parameters=True`,
            has a communication hook already, or was made while a trainable parameter was frozen.
    """
    if getattr(model, _PREPARED, False):
        return
    if model.static_graph:
        raise ValueError(
            "static_graph=True fixes the trained set at the first step, and ranks would silently diverge "
            "with later sets; wrap the model without it"
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
            "this DistributedDataParallel has a communication hook already and accepts no second one; "
            "wrap the model without it"
        ) from error
    setattr(model, _PREPARED, True)


def send_trained(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined] # missing in the stubs
) -> torch.futures.Future[torch.Tensor]:
    """Average the trained gradients of a bucket over the ranks; a hook for `register_comm_hook`.

    Args:
        group: the processes.
        bucket: gradients as views of one flat buffer; those of frozen parameters are not changed.
    """
    buffer: torch.Tensor = bucket.buffer()
    gradients = bucket.gradients()
    pairs = zip(bucket.parameters(), gradients, strict=True)
    chosen = [gradient for parameter, gradient in pairs if is_trained(parameter)]
    if not chosen:
        nothing: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        nothing.set_result(buffer)
        return nothing
    if len(chosen) == len(gradients):
        return _averaged(group, buffer).then(lambda _: buffer)
    packed = torch.cat([gradient.flatten() for gradient in chosen])

    def unpack(_: object) -> torch.Tensor:
        for gradient, mean in zip(chosen, packed.split([g.numel() for g in chosen]), strict=True):
            gradient.copy_(mean.view_as(gradient))
        return buffer

    return _averaged(group, packed).then(unpack)


def _averaged(group: dist.ProcessGroup, tensor: torch.Tensor) -> torch.futures.Future[object]:
    """Begin to replace a tensor by its mean over the ranks."""
    tensor.div_(group.size())
    work: Any = dist.all_reduce(tensor, group=group, async_op=True)
    return cast("torch.futures.Future[object]", work.get_future())


def _check_known(model: DistributedDataParallel) -> None:
    """Refuse a wrapper that was made while parameters were frozen: it would never synchronise them.

    Only the log of a wrapper shows how many parameters it synchronises.
    """
    trainable = sum(was_trainable(parameter) for parameter in unwrap(model).parameters())
    known: int = model._get_ddp_logging_data()["num_parameter_tensors"]
    if known < trainable:
        raise ValueError(
            f"{trainable - known} of {trainable} trainable parameters were frozen when the model was wrapped "
            f"in DistributedDataParallel, and ranks would diverge once they are trained; wrap the model "
            f"first, then call train_only"
        )
