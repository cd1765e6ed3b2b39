"""Data parallel training: one selection for all ranks, and only the trained gradients are sent.

Works on torch's own wrappers. In `DistributedDataParallel` a communication hook packs the gradients of
trained parameters out of each bucket; what is frozen has no gradient, before and after. `fully_shard` of
itself sends only what has a gradient (`fully_sharded.py`).
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


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks a model is trained on; has `DistributedDataParallel` send trained gradients alone.

    Raises:
        ValueError: for a wrapper that would send or train something else.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel (version 1) flattens the parameters of a module into one, and they are "
            "selected one by one; shard the model with torch.distributed.fsdp.fully_shard"
        )
    if isinstance(model, DistributedDataParallel):
        prepare(model)
        return Ranks(model.process_group)
    return Ranks(fsdp.group_of(unwrap(model)))


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
