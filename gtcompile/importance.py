"""Importance of each parameter: the loss reduction to first order that its own optimizer update predicts."""

import contextlib
import logging
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture import check_batch, list_parameters, loss_of, unwrap
from gtcompile.errors import GTCompileError
from gtcompile.optimizer_updates import ShadowOptimizer
from gtcompile.trained import is_frozen, match_patterns, train_only, trained_parameters

logger = logging.getLogger(__name__)


def measure_importance(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Mapping[str, Any]],
    *,
    only: Collection[str] | None = None,
    two_pass: bool = False,
) -> dict[str, float]:
    """How much training each parameter would reduce the loss in one step, to first order, averaged over batches.

    I_k = -<Dw_k, dL/dw_k>: Dw_k is what the optimizer's own next step would add to parameter k, from its present moments and
    hyperparameters, and dL/dw_k a gradient. By default Dw comes from the gradient of one batch and dL/dw from the next: the
    noise of the two is independent, so a parameter whose gradient is nothing but noise has importance near 0 (with one batch
    it would have the noise's variance). With `two_pass`, as in the paper: Dw from a batch, dL/dw from the same batch at the
    weights updated by Dw.

    Nothing changes: weights, the optimizer, accumulated gradients, buffers, the trained set and random states are
    bit-identical afterwards, also when this fails or is interrupted. Each gradient is used the moment it is complete and let
    go; what one batch leaves for the next lies in host memory. The model runs in the mode it is in (dropout of `train()` is
    noise like any other) and without its `torch.compile` wrapper, which would hand out all gradients at once. Autocast around
    the call applies. Hooks on parameters run as in any backward; gradient clipping and loss scaling do not apply.

    Args:
        model: compiled or not; returns its scalar loss or an output with `.loss`.
        optimizer: owns every parameter measured.
        batches: keyword dictionaries with labels, on any device; at least two, or one with `two_pass`. n batches cost n
            forward and backward passes (2n with `two_pass`) and give n - 1 estimates (n) to average.
        only: FQNs or shell-style patterns of the parameters to measure; None for all that are trained or that `train_only`
            froze.

    Returns:
        Importance by FQN in registration order, in units of the loss, not normalised; negative where the step would raise
        the loss. Parameters that `requires_grad_` froze or that no batch used are absent.

    Raises:
        ValueError, TypeError: before any work, when an argument does not fit: too few batches, a batch the model does not
            take, no trainable parameter, an optimizer that does not own the parameters or cannot move them.
        CaptureError: the model returns no loss.
        GTCompileError: no batch gave a finite loss, gradient and update (names the batches and the first parameter); a
            single bad batch is left out with a log message.
    """
    parameters = _measured(unwrap(model), only)
    shadow = ShadowOptimizer(optimizer)
    _check_owned(shadow, parameters)
    with _restored(unwrap(model)):
        checked = _check_batches(unwrap(model), batches, minimum=1 if two_pass else 2)
        with temporarily_training(model, _streamed(model, parameters)):
            stream = GradientStream(unwrap(model), {parameter: fqn for fqn, parameter in parameters.items()})
            estimate = _AtUpdatedWeights(stream, shadow) if two_pass else _AcrossBatches(stream, shadow)
            totals = _average(estimate, checked)
    return {fqn: totals.get(fqn, 0.0) for fqn in parameters if fqn in stream.arrived}


@contextlib.contextmanager
def temporarily_training(model: nn.Module, patterns: Collection[str] | None) -> Iterator[None]:
    """`train_only` for the length of a with-block; the former trained set afterwards.

    Gradients accumulated by parameters that are frozen on the way in or out are dropped, as `train_only` does.
    """
    former = trained_parameters(model)
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        train_only(model, patterns)
        yield
    finally:
        train_only(model, former)
        for parameter, requires_grad in asked:
            parameter.requires_grad_(requires_grad)


class NotFiniteError(GTCompileError):
    """A loss, gradient or update is infinite or not a number; the message says which."""


@dataclass(slots=True)
class GradientStream:
    """Runs batches forward and backward, handing over each gradient the moment it is complete.

    At no time do more gradients exist than autograd itself holds between two operators.
    """

    module: nn.Module
    """Returns its loss or an output with `.loss`."""
    names: Mapping[nn.Parameter, str]
    """The parameters whose gradients are handed over, with their FQNs; other gradients are dropped."""
    arrived: set[str] = field(default_factory=set)
    """FQNs that had a gradient in any batch so far."""

    def run(
        self, batch: Mapping[str, Any], consume: Callable[[str, nn.Parameter, torch.Tensor], None]
    ) -> None:
        """Forward and backward of one batch; `consume(fqn, parameter, gradient)` owns the gradient.

        Raises:
            NotFiniteError: at the first loss or gradient that is not finite; the backward ends there.
            GTCompileError: a gradient came in several parts.
        """
        seen: set[str] = set()

        def hand_over(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            if parameter in self.names and gradient is not None:
                fqn = self.names[parameter]
                _check_gradient(fqn, gradient, seen)
                seen.add(fqn)
                consume(fqn, parameter, gradient)

        asking = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(hand_over) for parameter in asking]  # type: ignore[arg-type]
        try:
            self._forward_backward(batch)
        finally:
            for handle in handles:
                handle.remove()
        self.arrived |= seen

    def _forward_backward(self, batch: Mapping[str, Any]) -> None:
        device = next(iter(self.names)).device
        with torch.enable_grad():
            loss = loss_of(self.module(**_on_device(batch, device)))
        if not torch.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss.item()}")
        with torch.autocast(device.type, enabled=False):  # a backward does not belong under autocast
            loss.backward()


class _Estimator(Protocol):
    def contributions(self, batch: Mapping[str, Any]) -> dict[str, float] | None:
        """-<Dw, dL/dw> by FQN, which this batch completes; None where it completes none."""


@dataclass(slots=True)
class _AcrossBatches:
    """Dw from the latest earlier gradient, dL/dw from this batch.

    A batch that turns out not finite contributes nothing; gradients it gave before that stay as earlier gradients: they come
    from another batch than the next, which is all that is asked of them.
    """

    stream: GradientStream
    shadow: ShadowOptimizer
    earlier: dict[str, torch.Tensor] = field(default_factory=dict)
    """Latest gradient by FQN, in host memory."""

    def contributions(self, batch: Mapping[str, Any]) -> dict[str, float] | None:
        found: dict[str, float] = {}

        def consume(fqn: str, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
            if fqn in self.earlier:
                update = self.shadow.update(parameter, self.earlier.pop(fqn))
                found[fqn] = _predicted_reduction(fqn, update, gradient)
            self.earlier[fqn] = gradient.to("cpu")

        first = not self.earlier
        self.stream.run(batch, consume)
        return None if first else found


@dataclass(slots=True)
class _AtUpdatedWeights:
    """The paper's form: Dw from this batch, dL/dw from this batch at the weights that all Dw together lead to."""

    stream: GradientStream
    shadow: ShadowOptimizer

    def contributions(self, batch: Mapping[str, Any]) -> dict[str, float]:
        gradients: dict[nn.Parameter, torch.Tensor] = {}
        found: dict[str, float] = {}

        def keep(fqn: str, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
            gradients[parameter] = gradient.to("cpu")

        def consume(fqn: str, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
            if parameter in former:
                update = parameter.detach() - former[parameter].to(parameter.device)
                found[fqn] = _predicted_reduction(fqn, update, gradient)

        self.stream.run(batch, keep)
        with self._updated(gradients) as former:
            self.stream.run(batch, consume)
        return found

    @contextlib.contextmanager
    def _updated(self, gradients: dict[nn.Parameter, torch.Tensor]) -> Iterator[dict[nn.Parameter, torch.Tensor]]:
        """Let the weights be what the optimizer's step makes of them; yields what they were, in host memory."""
        former: dict[nn.Parameter, torch.Tensor] = {}
        try:
            with torch.no_grad():
                while gradients:
                    parameter, gradient = gradients.popitem()
                    former[parameter] = parameter.detach().to("cpu", copy=True)
                    parameter.copy_(self.shadow.stepped(parameter, gradient))
            yield former
        finally:
            with torch.no_grad():
                for parameter, value in former.items():
                    parameter.copy_(value)


def _average(estimate: _Estimator, batches: Collection[Mapping[str, Any]]) -> dict[str, float]:
    """Mean contribution by FQN over the batches that complete one; a parameter without one in some batch has 0 there."""
    totals: dict[str, float] = {}
    counted, problems = 0, []
    for index, batch in enumerate(batches):
        try:
            found = estimate.contributions(batch)
        except NotFiniteError as problem:
            logger.warning("importance: batch %d is left out: %s", index, problem)
            problems.append(f"in batch {index} {problem}")
            continue
        if found is not None:
            counted += 1
            totals |= {fqn: totals.get(fqn, 0.0) + value for fqn, value in found.items()}
    if not counted:
        raise GTCompileError(f"too few of the {len(batches)} batches are finite to measure importance: {'; '.join(problems)}")
    return {fqn: total / counted for fqn, total in totals.items()}


def _predicted_reduction(fqn: str, update: torch.Tensor, gradient: torch.Tensor) -> float:
    reduction = -torch.dot(update.flatten().float(), gradient.flatten().float()).item()
    if not np.isfinite(reduction):
        raise NotFiniteError(f"the optimizer's update of {fqn} is not finite")
    return reduction


def _check_gradient(fqn: str, gradient: torch.Tensor, seen: Collection[str]) -> None:
    if fqn in seen:
        raise GTCompileError(
            f"the gradient of {fqn} came in several parts, as reentrant activation checkpointing does; "
            f"use torch.utils.checkpoint with use_reentrant=False"
        )
    if not torch.isfinite(gradient).all():
        raise NotFiniteError(f"the gradient of {fqn} is not finite")


def _measured(module: nn.Module, only: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters to measure by FQN, in registration order."""
    named = module.named_parameters()
    selectable = {fqn: parameter for fqn, parameter in named if parameter.requires_grad or is_frozen(parameter)}
    if not selectable:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad=True: nothing to measure")
    names = {name: p.fqn for p in list_parameters(module) if p.fqn in selectable for name in (p.fqn, *p.aliases)}
    chosen = frozenset(selectable) if only is None else match_patterns(names, only)
    if not chosen:
        raise ValueError("expected at least one parameter to measure, got an empty `only`; None measures all")
    return {fqn: parameter for fqn, parameter in selectable.items() if fqn in chosen}


def _check_owned(shadow: ShadowOptimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    missing = [fqn for fqn, parameter in parameters.items() if not shadow.owns(parameter)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"the optimizer does not own {', '.join(missing[:3])}{more} of {len(parameters)} parameters to measure; "
            f"make it from this model's parameters, or freeze those it shall not train with requires_grad_(False)"
        )


def _check_batches(
    module: nn.Module, batches: Iterable[Mapping[str, Any]], *, minimum: int
) -> tuple[Mapping[str, Any], ...]:
    if isinstance(batches, Mapping):
        raise TypeError("expected an iterable of batches, got one batch; write [batch, another_batch]")
    checked = tuple(batches)
    if len(checked) < minimum:
        expected = "at least one batch" if minimum == 1 else "at least two batches, one to step with and one to judge it by"
        hint = "; two_pass=True needs one" if checked else ""
        raise ValueError(f"expected {expected}, got {len(checked)}{hint}")
    for batch in checked:
        check_batch(module, batch)
    return checked


def _streamed(model: nn.Module, parameters: Collection[str]) -> Collection[str] | None:
    """What to train while measuring: no more than is measured, so that no other gradient is computed.

    Under a `torch.compile` wrapper everything: the module inside runs eager here, and a parameter that eager code is told to
    skip would stop asking for the gradient that its compiled region computes.
    """
    return None if unwrap(model) is not model else parameters


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _on_device(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_device(item, device) for item in value)
    return value


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Whatever running the module forward and backward changes is afterwards what it was."""
    with _random_states_kept(module), _buffers_kept(module), _gradients_set_aside(module):
        yield


@contextlib.contextmanager
def _random_states_kept(module: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type != "cpu"}
    python, array = random.getstate(), np.random.get_state()
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers are the same tensors with the same values afterwards, whether the forward wrote to them or replaced them."""
    owners = [(part, name, value) for part in module.modules() for name, value in part._buffers.items()]
    values = {value: value.detach().clone() for _, _, value in owners if value is not None}
    try:
        yield
    finally:
        for part, name, value in owners:
            part._buffers[name] = value
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)


@contextlib.contextmanager
def _gradients_set_aside(module: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
