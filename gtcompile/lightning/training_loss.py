"""The loss of a LightningModule's own `training_step`, computed without leaving a trace."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gtcompile.capture.pristine_model import attributes_kept
from gtcompile.errors import CaptureError
from gtcompile.lightning.framework import LightningModule, Trainer, framework
from gtcompile.state.restore import restored

BATCH_INDEX = 1
"""The `batch_idx` that a measured batch has: modules often do more at the first batch, as logging images."""


@dataclass(frozen=True, slots=True)
class TrainingLoss:
    """What `training_step` returns as the loss, under the precision of the trainer; a `loss_fn`."""

    trainer: Trainer
    indices: tuple[int, ...]
    """The arguments of `training_step` after the batch."""

    def __call__(self, module: nn.Module, batch: Any) -> torch.Tensor:
        """Compute the loss of one batch on the module's device, a scalar."""
        if torch.compiler.is_dynamo_compiling():  # a capture restores the module's attributes itself
            return self._loss(module, batch)
        return self._loss_without_trace(module, batch)

    def _loss_without_trace(self, module: nn.Module, batch: Any) -> torch.Tensor:
        # eager blocks hand over gradients one at a time
        with attributes_kept(module), torch.compiler.set_stance("force_eager"):
            return self._loss(module, batch)

    def _loss(self, module: Any, batch: Any) -> torch.Tensor:
        with self.trainer.precision_plugin.train_step_context():
            output = module.training_step(batch, *self.indices)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, torch.Tensor):
            raise CaptureError(
                f"expected training_step to return the loss, or a dictionary with it under 'loss', for every "
                f"batch of the training data; got {type(loss).__name__}"
            )
        return loss


def training_loss(trainer: Trainer, module: LightningModule) -> TrainingLoss:
    """Make the loss function of a module, whose `training_step` may take an index after the batch."""
    parameters = inspect.signature(module.training_step).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_index = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return TrainingLoss(trainer, (BATCH_INDEX,) if takes_index else ())


def check_loss(loss: TrainingLoss, module: LightningModule, batches: Iterable[Any]) -> Iterator[Any]:
    """Compute the loss of the first batch, without gradients, before anything is captured.

    An error in `training_step` then is that error, and not one of a capture. It also lets libraries look up
    at their first call what Dynamo cannot trace.

    Yields:
        The batches, all of them.

    Raises:
        CaptureError: `training_step` returns no loss.
    """
    for number, batch in enumerate(batches):
        if number == 0:
            with torch.no_grad(), restored(module):
                loss(module, batch)
        yield batch


@contextlib.contextmanager
def untouched(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Within the block nothing is logged; afterwards the trainer's attributes and metrics are as before.

    Metrics of torchmetrics count in tensors that are plain attributes: their values are restored.
    """
    parts = [part for part in module.modules() if isinstance(part, LightningModule)]
    own = [{name: vars(part)[name] for name in _LOGGING if name in vars(part)} for part in parts]
    kept, values = dict(vars(trainer)), _tensor_attributes(module)
    trainer.loggers = [framework.loggers.logger.DummyLogger() for _ in trainer.loggers]
    for part in parts:
        vars(part).update(_LOGGING)
    try:
        yield
    finally:
        for part, former in zip(parts, own, strict=True):
            for name in _LOGGING:
                vars(part).pop(name, None)
            vars(part).update(former)
        vars(trainer).clear()
        vars(trainer).update(kept)
        _restore(values)


def _log_nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for the logging methods of a LightningModule."""


_LOGGING = {"log": _log_nothing, "log_dict": _log_nothing}


def _tensor_attributes(module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = {
        id(value): value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor)
    }
    return [(tensor, tensor.detach().clone()) for tensor in found.values()]


def _restore(values: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
