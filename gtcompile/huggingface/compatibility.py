"""Settings of Hugging Face's trainers that would undo adaptive backpropagation: refused, or repaired."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from gtcompile.capture.pristine_model import uses_compiled_code, without_forcing

logger = logging.getLogger(__name__)


def check_trainer(trainer: Trainer, callback: type[TrainerCallback]) -> None:
    """Refuse a trainer whose settings would undo the callback.

    Raises:
        ValueError: says which setting, why and what to do.
    """
    for problem in _problems(trainer, callback):
        raise ValueError(problem)


def check_uncompiled(trainer: Trainer, callback: type[TrainerCallback]) -> None:
    """Refuse a trainer whose model would be compiled a second time.

    Raises:
        ValueError: says what to give the trainer instead.
    """
    model: Any = trainer.model
    if uses_compiled_code(model):
        raise ValueError(
            f"the model is compiled already, and {callback.__name__} compiles its blocks; give the trainer "
            f"the model as it was before torch.compile or compile_blocks"
        )


def check_labels_stay(trainer: Trainer) -> None:
    """Refuse `labelled_logits` for a trainer that does not leave the loss to the model.

    Raises:
        ValueError: says what computes the loss instead.
    """
    if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
        raise ValueError(
            f"labelled_logits=True needs a trainer that leaves the loss to the model, and "
            f"{type(trainer).__name__} of TRL computes it from the head's weights by itself; leave it out"
        )
    settings = {
        "label_smoothing_factor": trainer.args.label_smoothing_factor,
        "compute_loss_func": trainer.compute_loss_func,
    }
    for name in (name for name, value in settings.items() if value):
        raise ValueError(
            f"labelled_logits=True needs the model's own loss, and {name} replaces it; leave out one of them"
        )


@contextlib.contextmanager
def input_hooks_removed(model: nn.Module) -> Iterator[None]:
    """Within the block, leave out the hooks that make embedding outputs require grad; PEFT and TRL add some.

    Only reentrant checkpointing needs them. With any other, the backward would run through every frozen block
    below the deepest trained parameter.
    """
    former = {module: dict(module._forward_hooks) for module in model.modules()}
    former = {module: hooks for module, hooks in former.items() if without_forcing(hooks) != hooks}
    for module, hooks in former.items():
        _replace(module._forward_hooks, without_forcing(hooks))
        logger.info(
            "removed a hook that makes embedding outputs require grad: the backward would run down to it"
        )
    try:
        yield
    finally:
        for module, hooks in former.items():
            now, others = dict(module._forward_hooks), without_forcing(hooks)
            kept = {key: hook for key, hook in hooks.items() if key in now or key not in others}
            _replace(module._forward_hooks, kept | now)  # in the order in which they ran before


def _replace(hooks: dict[int, Any], by: dict[int, Any]) -> None:
    hooks.clear()
    hooks.update(by)


def _problems(trainer: Trainer, callback: type[TrainerCallback]) -> Iterator[str]:
    args, name = trainer.args, callback.__name__
    if sum(isinstance(c, callback) for c in trainer.callback_handler.callbacks) > 1:
        yield f"expected one {name}, got two: each would undo the other's selection; remove one"
    if args.torch_compile:
        yield f"torch_compile=True compiles the model a second time; leave it off, {name} compiles the blocks"
    if trainer.is_deepspeed_enabled:
        yield (
            "DeepSpeed keeps gradients and optimizer states in flat buffers of its own, from which a frozen "
            "parameter cannot be left out; train without it"
        )
    sharding = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and getattr(sharding, "fsdp_version", 1) != 2:
        yield (
            f"{name} does not work with version 1 of FSDP, which flattens several parameters into one, while "
            f'they are selected one by one; set fsdp_config={{"version": 2}}'
        )
    if args.n_gpu > 1:
        yield (
            f"{name} works with one device per process, got {args.n_gpu}: DataParallel copies the model at "
            f"every step. Start one process per device with torchrun, or set CUDA_VISIBLE_DEVICES to one"
        )
    checkpointing = args.activation_checkpointing or args.gradient_checkpointing
    kwargs: Any = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}
    if checkpointing and kwargs.get("use_reentrant"):
        yield (
            "reentrant checkpointing computes gradients in separate backward passes, where the trained set "
            'cannot be seen as a whole; set gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
