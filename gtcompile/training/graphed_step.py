"""Whole training steps that are recorded once per trained set and replayed, as CUDA graphs are.

A recording contains fixed addresses and fixed Python numbers. So it holds as long as its *circumstances* do:
the trained set, the addresses of parameters, the optimizer's state and numbers, and `model.training`. Every
step compares them first. What runs on the device is the business of a `Recorder` (`cuda_graphs.py`).
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gtcompile.capture.batch_tree import split_batch
from gtcompile.capture.model_io import LossFunction
from gtcompile.errors import GTCompileError
from gtcompile.importance.gradient_stream import batch_loss
from gtcompile.state.shadow_optimizer import innermost
from gtcompile.state.trained_set import generation

logger = logging.getLogger(__name__)
WARM_UP = 3
"""Ordinary steps under equal circumstances before one is recorded. They compile what is missing, and let
libraries allocate their workspaces, which a recording cannot do. torch warms up three times as well."""


class Recorder(Protocol):
    """Records the operations of a device."""

    def aside(self) -> AbstractContextManager[object]:
        """Run ordinary steps where recorded ones will run, because autograd remembers where it ran."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record the operations of a step without running them; return a function that runs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What a recording of a step relies on, apart from its batch."""

    trained: int
    """Changes with the trained set."""
    addresses: tuple[int, ...]
    """Where parameters and buffers are."""
    state: tuple[int, int]
    """Identity and size of the optimizer's state."""
    numbers: tuple[object, ...]
    """Learning rates and other settings of the optimizer; identities of those that are tensors."""
    training: tuple[bool, ...]
    """Which modules are in training mode."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a recording of a step relies on in its batch."""

    tensors: tuple[tuple[torch.Size, torch.dtype], ...]
    """Shape and type of each tensor."""
    others: Any
    """The batch with the names of tensors in their places."""

    def match(self, other: "Shapes") -> bool:
        """Whether two batches differ only in the values of tensors; what cannot be compared differs."""
        if self.tensors != other.tensors:
            return False
        try:
            return bool(self.others == other.others)
        except Exception:  # such as comparisons of arrays, whose truth is ambiguous
            return False


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded step."""

    shapes: Shapes
    """Of the batches that it takes."""
    buffers: Mapping[str, Tensor]
    """The tensors that it reads the batch from."""
    replay: Callable[[], Tensor]
    """Runs it and returns the loss, which the next replay overwrites."""


class GraphedStep:
    """Trains on one batch per call; replays a recording where one fits.

    A step is recorded after `WARM_UP` ordinary steps in a row under equal circumstances with batches of equal
    shapes. All of these train. A batch of other shapes runs as an ordinary step. One recording is kept.

    Args:
        model: on one device.
        optimizer: whose step reads nothing back from the device.
        loss_fn: takes the model and a batch and returns the scalar loss; None if the model returns it.
        recorder: of that device.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss_fn: LossFunction | None, recorder: Recorder
    ) -> None:
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._recorder = recorder
        self._device = next(model.parameters()).device
        self._recording: Recording | None = None
        self._circumstances: Circumstances | None = None
        self._shapes: Shapes | None = None
        self._steps = 0  # in a row with equal circumstances and shapes
        self._changes = 0  # of the optimizer's numbers, in a row

    @property
    def recorded(self) -> bool:
        """Whether there is a recording now."""
        return self._recording is not None

    def forget(self) -> None:
        """Free the recording and the memory that it holds."""
        self._recording = self._circumstances = self._shapes = None
        self._steps = 0

    def __call__(self, batch: Any) -> Tensor:
        """Run forward, backward and the optimizer for one batch; gradients are None before and after.

        Returns:
            The loss, without history.

        Raises:
            GTCompileError: there are gradients from before, autocast is on, or the step cannot be recorded.
        """
        self._refuse_gradients()
        self._refuse_autocast()
        tensors, rebuild = split_batch(batch)
        self._compare_circumstances()
        names: dict[str, Any] = {name: name for name in tensors}
        shapes = Shapes(tuple((t.shape, t.dtype) for t in tensors.values()), rebuild(names))
        if self._recording is not None and self._recording.shapes.match(shapes):
            self._steps = 0
            return self._replay(self._recording, tensors)
        self._steps = self._steps + 1 if self._shapes and self._shapes.match(shapes) else 1
        self._shapes = shapes
        if self._steps <= WARM_UP:
            with self._recorder.aside():
                return self._train_on(rebuild(self._moved(tensors)))
        self._recording = None  # frees its memory before another one is made
        buffers = self._moved(tensors, copy=True)
        self._recording = Recording(shapes, buffers, self._record(rebuild(buffers)))
        return self._replay(self._recording, tensors)

    def _train_on(self, batch: Any) -> Tensor:
        loss = batch_loss(self._model, batch, self._loss_fn)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _record(self, batch: Any) -> Callable[[], Tensor]:
        try:
            return self._recorder.record(lambda: self._train_on(batch))
        except Exception as error:
            self.forget()
            self._optimizer.zero_grad(set_to_none=True)
            raise GTCompileError(
                f"a training step of {type(self._model).__name__} cannot be recorded: {error}. The usual "
                f"reasons are .item(), a branch on values, and a copy from the host. Find it with "
                f'torch.cuda.set_sync_debug_mode("error"), or train without cuda_graphs'
            ) from error

    def _replay(self, recording: Recording, tensors: Mapping[str, Tensor]) -> Tensor:
        for name, buffer in recording.buffers.items():
            buffer.copy_(tensors[name], non_blocking=True)
        return recording.replay().clone()

    def _moved(self, tensors: Mapping[str, Tensor], *, copy: bool = False) -> dict[str, Tensor]:
        return {name: t.to(self._device, non_blocking=True, copy=copy) for name, t in tensors.items()}

    def _refuse_gradients(self) -> None:
        if any(parameter.grad is not None for parameter in self._model.parameters()):
            raise GTCompileError(
                "expected no gradients before train_step, since a recorded step does not accumulate them; "
                "call optimizer.zero_grad() first, and no backward() of your own"
            )

    def _refuse_autocast(self) -> None:
        if torch.is_autocast_enabled(self._device.type):
            raise GTCompileError(
                "train_step was called under torch.autocast, whose cache of converted weights would outlive "
                "the recording; use autocast inside of loss_fn"
            )

    def _compare_circumstances(self) -> None:
        """Forget the recording if anything that it relies on has changed."""
        before, self._circumstances = self._circumstances, self._look()
        if before == self._circumstances:
            self._changes = 0
            return
        self._recording, self._steps = None, 0
        changed = before is not None and before.numbers != self._circumstances.numbers
        self._changes = self._changes + 1 if changed else 0
        if self._changes == WARM_UP:
            logger.warning(
                "nothing is recorded while a setting of the optimizer changes at every step; a learning rate "
                "with a schedule must be a tensor on the device: lr=torch.tensor(1e-4, device=...)"
            )

    def _look(self) -> Circumstances:
        state = innermost(self._optimizer).state
        return Circumstances(
            trained=generation(),
            addresses=tuple(t.data_ptr() for t in chain(self._model.parameters(), self._model.buffers())),
            state=(id(state), len(state)),
            numbers=tuple(self._numbers()),
            training=tuple(module.training for module in self._model.modules()),
        )

    def _numbers(self) -> Iterator[object]:
        for group in innermost(self._optimizer).param_groups:
            for name, value in group.items():
                if name != "params":
                    yield id(value) if isinstance(value, Tensor) else value
