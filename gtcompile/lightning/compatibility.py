"""Settings of a Lightning trainer that would undo adaptive backpropagation: refused before any work."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from gtcompile.capture.model_io import unwrap
from gtcompile.capture.pristine_model import is_compiled
from gtcompile.lightning.framework import Callback, LightningModule, Trainer, framework


def check_trainer(
    trainer: Trainer, module: LightningModule, callback: type[Callback], *, compiled: bool
) -> None:
    """Refuse a trainer or a module with which the callback cannot work.

    Args:
        trainer: of a fit that begins.
        module: its module.
        callback: the class of the callback.
        compiled: whether the callback will compile the module's blocks.

    Raises:
        ValueError: says which setting, why and what to do.
    """
    name = callback.__name__
    problems = [_of_callbacks(trainer, name), _of_strategy(trainer, name), _of_module(module, name)]
    if compiled:
        problems.append(_of_compilation(module, name))
    for problem in itertools.chain(*problems):
        raise ValueError(problem)


def check_replicas(trainer: Trainer) -> None:
    """Refuse a `DistributedDataParallel` that waits for the gradients of frozen parameters.

    Raises:
        ValueError: says which strategy to use.
    """
    model = trainer.model
    if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
        raise ValueError(
            "this strategy waits for the gradient of every parameter, and frozen ones have none; use "
            'Trainer(strategy="ddp_find_unused_parameters_true")'
        )


def _of_callbacks(trainer: Any, name: str) -> Iterator[str]:
    for other in trainer.callbacks:
        if isinstance(other, framework.callbacks.BaseFinetuning):
            yield (
                f"{type(other).__name__} freezes parameters as well, and each would undo the other; remove "
                f"that callback or {name}"
            )


def _of_strategy(trainer: Trainer, name: str) -> Iterator[str]:
    strategy, strategies = trainer.strategy, framework.strategies
    if isinstance(strategy, strategies.DeepSpeedStrategy):
        yield (
            "DeepSpeed keeps gradients and optimizer states in flat buffers of its own, from which a frozen "
            "parameter cannot be left out; train without it"
        )
    if isinstance(strategy, strategies.FSDPStrategy):
        yield (
            f"{name} does not work with FSDPStrategy, version 1 of FSDP, which flattens several "
            f"parameters into one, while they are selected one by one; shard the model with fully_shard in a "
            f"loop of your own, where gtcompile.AdaptiveBackprop works"
        )
    if not isinstance(strategy, strategies.SingleDeviceStrategy | strategies.DDPStrategy):
        yield (
            f"{name} was made for one device and for DistributedDataParallel, and was never run "
            f'with {type(strategy).__name__}; use strategy="auto" or "ddp_find_unused_parameters_true"'
        )


def _of_module(module: LightningModule, name: str) -> Iterator[str]:
    if not module.automatic_optimization:
        yield (
            f"with automatic_optimization=False, training_step itself runs the backward and the optimizers, "
            f"so {name} cannot measure its loss without training; leave {name} out, and call reselect and "
            f"step of a gtcompile.AdaptiveBackprop of your own in training_step"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield (
            "a training_step that takes dataloader_iter fetches batches itself, so no other batch can be "
            "measured; have it take batch and batch_idx"
        )


def _of_compilation(module: LightningModule, name: str) -> Iterator[str]:
    by_lightning = getattr(module, "_compiler_ctx", None) is not None
    if by_lightning or any(unwrap(part) is not part or is_compiled(part) for part in module.modules()):
        yield (
            f"the module is compiled already, and {name} compiles its blocks; give the trainer "
            f"the module as it was before torch.compile or compile_blocks"
        )
