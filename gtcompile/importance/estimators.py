"""Importance of each parameter: the loss reduction that its optimizer update predicts, to first order."""

import contextlib
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture.model_io import LossFunction, check_batch, unwrap
from gtcompile.distributed import fsdp
from gtcompile.distributed.fsdp import copies, local, with_local
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import GTCompileError, some
from gtcompile.graph.names import match_patterns
from gtcompile.importance.gradient_stream import GradientStream, NotFiniteError
from gtcompile.importance.kept_gradients import KeptGradients
from gtcompile.state.host_memory import HOST, to_host
from gtcompile.state.restore import restored, temporarily_training
from gtcompile.state.shadow_optimizer import ShadowOptimizer
from gtcompile.state.trained_set import enter_shards, selectable_names, trained_parameters

logger = logging.getLogger(__name__)


def measure_importance(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    only: Collection[str] | None = None,
    two_pass: bool = False,
) -> dict[str, float]:
    """Measure how much one step on each parameter would reduce the loss, to first order.

    I_k = -<Dw_k, dL/dw_k>, averaged over batches. Dw_k is what the optimizer's own next step would add to
    parameter k, given its present moments and hyperparameters, and dL/dw_k is a gradient. By default Dw comes
    from the gradient of one batch and dL/dw from the next one. Their noise is independent, so a parameter
    whose gradient is nothing but noise has an importance near 0; with one batch for both, its importance
    would be the variance of the noise. With `two_pass`, the paper's form, dL/dw comes from the same batch as
    Dw, at the weights that all Dw lead to.

    Nothing changes: weights, the optimizer, accumulated gradients, buffers, the trained set and random states
    are bit-identical afterwards, even if the call fails or is interrupted. Each gradient is used soon after
    it is complete and then freed. Gradients kept from one batch to the next stay on the model's device if all
    of them fit there beside the activations; otherwise they are in host memory.

    The model runs in its present mode (dropout is noise like any other), and without a `torch.compile`
    wrapper, which would return all gradients at once. Autocast around the call applies to the forward. Hooks
    on parameters run as in any backward; gradient clipping and loss scaling do not apply.

    Args:
        model: compiled or not; returns its scalar loss or an output with `.loss`, unless `loss_fn` computes
            the loss.
        optimizer: owns every parameter measured.
        batches: at least two, or one with `two_pass`; each the keyword dictionary of the model's forward with
            labels, or with `loss_fn` anything; on any device. The mean is over n - 1 estimates from n forward
            and backward passes, or over n estimates from 2n passes with `two_pass`.
        loss_fn: takes the model and a batch on the model's device and returns the scalar loss.
        only: FQNs or shell-style patterns of the parameters to measure; None for all that are trained or that
            `train_only` froze.
        two_pass: measure as the paper does.

    Returns:
        Importance by FQN in registration order, in units of the loss, not normalised; negative where the step
        would raise the loss. Parameters that the user froze or that no batch used are absent.

    Raises:
        ValueError, TypeError: before any work, for too few batches, a batch the model does not take, no
            trainable parameter, a pattern without match, or an optimizer that does not own the parameters.
        CaptureError: there is no loss.
        GTCompileError: too few batches have a finite loss, gradients and updates (names them and the first
            parameter). Single bad batches are left out, with a log message.
    """
    module = unwrap(model)
    enter_shards(module)
    ranks = Ranks(fsdp.group_of(module))
    shadow = ShadowOptimizer(optimizer)
    with restored(module):
        parameters = _measured(model, only)
        _check_owned(shadow, parameters)
        checked = check_batches(model, batches, minimum=1 if two_pass else 2, loss_fn=loss_fn)
        names = {parameter: fqn for fqn, parameter in parameters.items()}
        stream = GradientStream(module, names, ranks, loss_fn)
        with temporarily_training(model, _trained_meanwhile(model, parameters)):
            estimator: _Estimator = (
                _AtUpdatedWeights(stream, shadow)
                if two_pass
                else _AcrossBatches(stream, shadow, KeptGradients(names))
            )
            means = ranks.total(_average(estimator, checked))
    return {fqn: means.get(fqn, 0.0) for fqn in parameters if fqn in stream.arrived}


def check_batches(
    model: nn.Module, batches: Iterable[Any], *, minimum: int, loss_fn: LossFunction | None = None
) -> tuple[Any, ...]:
    """Check the number of batches and that the model takes them.

    Returns:
        The batches.

    Raises:
        TypeError: for a single batch, or without `loss_fn` for a batch that is not a keyword dictionary.
        ValueError: for too few batches, or keys that the model's forward does not take.
    """
    if isinstance(batches, Mapping | torch.Tensor):
        raise TypeError("expected an iterable of batches, got one batch; write [batch, another_batch]")
    checked = tuple(batches)
    if len(checked) < minimum:
        pair = "two batches, one to step with and one to judge the step by (two_pass=True takes one)"
        raise ValueError(f"expected at least {pair if minimum == 2 else 'one batch'}, got {len(checked)}")
    for batch in checked if loss_fn is None else ():
        check_batch(unwrap(model), batch)
    return checked


class _Estimator(Protocol):
    def contributions(self, batch: Any) -> dict[str, float] | None:
        """The products -<Dw, dL/dw> by FQN that this batch completes; None if it can complete none."""


@dataclass(slots=True)
class _AcrossBatches:
    """Dw from the latest earlier gradient, dL/dw from this batch.

    A batch that turns out not to be finite contributes nothing. Those of its gradients that are finite still
    serve as earlier gradients, for they are independent of the next batch.
    """

    stream: GradientStream
    shadow: ShadowOptimizer
    earlier: KeptGradients

    def contributions(self, batch: Any) -> dict[str, float] | None:
        products = _Products(self.shadow)
        first = not len(self.earlier)
        replaced: set[str] = set()
        without_earlier: set[str] = set()

        def consume(fqn: str, parameter: nn.Parameter, gradient: torch.Tensor, finite: torch.Tensor) -> None:
            replaced.add(fqn)
            if fqn not in self.earlier:
                without_earlier.add(fqn)
                self.earlier.put(fqn, gradient)
                return
            earlier = self.earlier.take(fqn, gradient.device)
            self.earlier.put(fqn, _usable(finite, gradient, earlier))
            products.add(fqn, parameter, earlier, gradient)

        try:
            self.stream.run(batch, consume)
            return None if first else products.read()
        except NotFiniteError as problem:
            self.earlier.drop(problem.gradients & without_earlier)
            self._forget_shards(replaced - problem.gradients)
            raise

    def _forget_shards(self, replaced: set[str]) -> None:
        """Drop gradients of which ranks may hold shards from different batches."""
        if self.stream.ranks.count > 1:
            self.earlier.drop(set().union(*self.stream.ranks.gather(replaced)))


def _usable(finite: torch.Tensor, gradient: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """A gradient if it is finite, else the earlier one; decided on the device, for the host does not wait."""
    part = local(gradient)
    if type(part) is torch.Tensor and part.layout is torch.strided:
        return with_local(gradient, torch.where(finite, part, local(earlier)))
    return gradient if finite else earlier.clone()  # the optimizer may overwrite it


class _Products:
    """The products -<Dw, dL/dw> of one batch, computed for many parameters at a time.

    An optimizer's step takes a while to call and, for a small parameter, no time to compute.

    Args:
        shadow: computes Dw.
    """

    def __init__(self, shadow: ShadowOptimizer) -> None:
        self._shadow = shadow
        self._waiting: list[tuple[str, nn.Parameter, torch.Tensor, torch.Tensor]] = []
        self._waiting_bytes = 0
        self._products: dict[str, torch.Tensor] = {}
        self._finite: dict[str, torch.Tensor] = {}

    def add(self, fqn: str, parameter: nn.Parameter, earlier: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add one parameter.

        Args:
            fqn: of the parameter.
            parameter: steps by the earlier gradient.
            earlier: its gradient in an earlier batch; may be overwritten.
            gradient: its gradient in this batch.
        """
        self._waiting.append((fqn, parameter, earlier, gradient))
        self._waiting_bytes += local(parameter).nbytes
        if self._waiting_bytes >= _TOGETHER:
            self._compute()

    def read(self) -> dict[str, float]:
        """All products by FQN; this waits for the device.

        Raises:
            NotFiniteError: an update or a product is not finite.
        """
        self._compute()
        return {fqn: self._checked(fqn, value) for fqn, value in _values(self._products).items()}

    def _compute(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if not waiting:
            return
        updates = self._shadow.updates({parameter: earlier for _, parameter, earlier, _ in waiting})
        for fqn, parameter, _, gradient in waiting:
            self._products[fqn] = _predicted_reduction(updates[parameter], gradient)
            self._finite[fqn] = torch.isfinite(local(updates[parameter])).all()

    def _checked(self, fqn: str, value: float) -> float:
        if math.isfinite(value):
            return value
        if not self._finite[fqn]:
            raise NotFiniteError(f"the optimizer's update of {fqn} is not finite")
        raise NotFiniteError(f"the predicted loss reduction of {fqn} is {value}")


_TOGETHER = 1 << 26
"""Bytes of parameters whose updates are computed together; a larger parameter is alone."""


def _values(numbers: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Read numbers all at once."""
    if not numbers:
        return {}
    device = next(iter(numbers.values())).device
    read = torch.stack([number.to(device) for number in numbers.values()]).tolist()
    return dict(zip(numbers, read, strict=True))


@dataclass(slots=True)
class _AtUpdatedWeights:
    """The paper's form: Dw from this batch, dL/dw from this batch at the weights that all Dw lead to."""

    stream: GradientStream
    shadow: ShadowOptimizer

    def contributions(self, batch: Any) -> dict[str, float]:
        gradients = KeptGradients(self.stream.names)
        products: dict[str, torch.Tensor] = {}

        def keep(fqn: str, _: nn.Parameter, gradient: torch.Tensor, __: torch.Tensor) -> None:
            gradients.put(fqn, gradient)

        def consume(fqn: str, parameter: nn.Parameter, gradient: torch.Tensor, _: torch.Tensor) -> None:
            if parameter in former:
                update = parameter.detach() - former[parameter].to(parameter.device, non_blocking=True)
                products[fqn] = _predicted_reduction(update, gradient)

        self.stream.run(batch, keep)
        with self._updated(gradients) as former:
            self.stream.run(batch, consume)
        found = _values(products)
        wrong = [fqn for fqn, value in found.items() if not math.isfinite(value)]
        if wrong:
            raise NotFiniteError(f"the predicted loss reduction of {wrong[0]} is {found[wrong[0]]}")
        return found

    @contextlib.contextmanager
    def _updated(self, gradients: KeptGradients) -> Iterator[dict[nn.Parameter, torch.Tensor]]:
        """Set the weights to those after the optimizer's step; yield the former ones, in host memory."""
        former: dict[nn.Parameter, torch.Tensor] = {}
        with_gradient = [(p, fqn) for p, fqn in self.stream.names.items() if fqn in gradients]
        try:
            with torch.no_grad():
                for parameter, fqn in with_gradient:
                    own = parameter.detach()
                    former[parameter] = own.clone() if own.device == HOST else to_host(own)
                    value = self.shadow.stepped(parameter, gradients.take(fqn, parameter.device))
                    _check_update(fqn, value)
                    parameter.copy_(value)
            yield former
        finally:
            with torch.no_grad():
                for parameter, value in former.items():
                    parameter.copy_(value)


def _average(estimator: _Estimator, batches: Collection[Any]) -> dict[str, float]:
    """Average the contributions by FQN over the batches that complete any; a missing one counts as 0."""
    totals: dict[str, float] = {}
    counted, problems = 0, dict[int, NotFiniteError]()
    for index, batch in enumerate(batches):
        try:
            found = estimator.contributions(batch)
        except NotFiniteError as problem:
            problems[index] = problem
            continue
        if found is not None:
            counted += 1
            totals |= {fqn: totals.get(fqn, 0.0) + value for fqn, value in found.items()}
    if not counted:
        reasons = some([f"in batch {index} {problem}" for index, problem in problems.items()], "; ")
        raise GTCompileError(f"too few of {len(batches)} batches are fit to measure importance: {reasons}")
    _tell_left_out(problems)
    return {fqn: total / counted for fqn, total in totals.items()}


def _tell_left_out(problems: Mapping[int, NotFiniteError]) -> None:
    """Say once for all batches that were not finite which these are, and what was wrong with the first."""
    if len(problems) == 1:
        logger.warning("importance: batch %d is left out: %s", *next(iter(problems.items())))
    elif problems:
        which, problem = some(list(map(str, problems))), next(iter(problems.values()))
        logger.warning("importance: batches %s are left out; the first because %s", which, problem)


def _predicted_reduction(update: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Compute -<update, gradient>; for sharded tensors this rank's part of the sum."""
    return -torch.dot(_real_vector(update), _real_vector(gradient)) / copies(gradient)


def _real_vector(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor as one float32 vector; a complex number gives its two parts.

    A sparse gradient becomes dense only here, because SparseAdam steps with nothing else.
    """
    own = local(tensor).to_dense()
    return (torch.view_as_real(own.resolve_conj()) if own.is_complex() else own).flatten().float()


def _check_update(fqn: str, update: torch.Tensor) -> None:
    if not torch.isfinite(local(update)).all():
        raise NotFiniteError(f"the optimizer's update of {fqn} is not finite")


def _measured(model: nn.Module, only: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters to measure by FQN, in registration order."""
    module = unwrap(model)
    if not trained_parameters(model):
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad=True to measure")
    names = selectable_names(model)
    chosen = match_patterns(names, names if only is None else only)
    if not chosen:
        raise ValueError("expected at least one parameter to measure, got none in `only`; None means all")
    return {fqn: parameter for fqn, parameter in module.named_parameters() if fqn in chosen}


def _check_owned(shadow: ShadowOptimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    missing = [fqn for fqn, parameter in parameters.items() if not shadow.owns(parameter)]
    if missing:
        raise ValueError(
            f"the optimizer does not own {some(missing)}, of {len(parameters)} parameters to "
            f"measure; make it from this model's parameters, or freeze the others with requires_grad_(False)"
        )


def _trained_meanwhile(model: nn.Module, parameters: Collection[str]) -> Collection[str] | None:
    """The parameters to train while measuring: those to measure, so that no other gradient is computed.

    None, which trains everything, under a `torch.compile` wrapper. The module inside runs eagerly here, so
    freezing would set `requires_grad` to False, which the compiled region guards on.
    """
    return parameters if unwrap(model) is model else None
