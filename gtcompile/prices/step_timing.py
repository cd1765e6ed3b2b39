"""Seconds of a training step for any set of trained parameters, from timing a few sets on this machine.

A step takes a fixed time (the forward), a time for each FLOP of the activation gradients, another one for
each FLOP of the weight gradients, and a time for each trained parameter and each of its elements (its
gradient's launch, and the optimizer). These rates are fitted to measured steps of the model itself, so they
contain what no roofline knows: fusion, caches, the overhead of launches, this machine.
"""

import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture.model_io import LossFunction, unwrap
from gtcompile.costs.backward_costs import BackwardCosts
from gtcompile.costs.prices import NANOSECONDS, Price, SharedAmount, make_price
from gtcompile.importance.gradient_stream import batch_loss, on_device
from gtcompile.selection.blocks import from_the_output
from gtcompile.state.restore import restored, temporarily_training
from gtcompile.state.shadow_optimizer import ShadowOptimizer

logger = logging.getLogger(__name__)

Clock = Callable[[], float]
"""Tells seconds since some moment."""
ROUNDS = (3, 9)
"""Least and most rounds in which every set is timed once."""
ENOUGH_S = 4.0
"""Seconds after which no further round begins."""
_POOR_FIT = 0.1
"""Share by which a timed set may differ from what the rates predict before a warning says so."""
_MOST_ELEMENTS, _MOST_PARAMETERS = 1 << 22, 64
"""Size of the samples of parameters on which the optimizer is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRates:
    """Seconds that the parts of a training step take on one machine."""

    fixed: float
    """Seconds of every step."""
    shared_flop: float
    """Seconds of a FLOP that the gradients of several parameters need: activation gradients."""
    own_flop: float
    """Seconds of a FLOP that only one parameter's gradient needs."""
    parameter: float
    """Seconds of each trained parameter, whatever its size."""
    element: float
    """Seconds of each element of the trained parameters: the optimizer's."""

    def price(self, costs: BackwardCosts) -> Price:
        """Nanoseconds of a step for any set of trained parameters."""
        works = (
            SharedAmount(
                _nanoseconds(work.flops * (self.own_flop if len(work.parameters) == 1 else self.shared_flop)),
                work.parameters,
            )
            for work in costs.shared_work
        )
        own = (
            SharedAmount(_nanoseconds(self.parameter + p.numel * self.element), frozenset({p.fqn}))
            for p in costs.parameters
            if p.status == "selectable"
        )
        return make_price(_nanoseconds(self.fixed), [*works, *own])


@dataclass(frozen=True, slots=True)
class MeasuredRates:
    """Rates, and the FLOPs of a full step at the shapes that they were measured at."""

    full_flops: int
    rates: StepRates

    def to_json(self) -> dict[str, Any]:
        """The values as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "MeasuredRates":
        """Restore what `to_json` returned."""
        return cls(values["full_flops"], StepRates(**values["rates"]))


def measure_rates(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Any,
    costs: BackwardCosts,
    loss_fn: LossFunction | None,
    clock: Clock = time.perf_counter,
) -> StepRates:
    """Time steps with a few trained sets, and fit the rates; weights, moments and gradients do not change.

    Args:
        model: compiled or not.
        optimizer: the one that trains it.
        batch: of the shapes of every step.
        costs: of the model at these shapes.
        loss_fn: as for `backward_costs`.
        clock: tells seconds.
    """
    batch = on_device(batch, next(model.parameters()).device)
    sets = probe_sets(costs)
    logger.info("timing steps with %d trained sets, for budget_seconds", len(sets))
    passes = _time_passes(model, sets, lambda: batch_loss(model, batch, loss_fn), clock)
    fixed, shared, own, launch = _fit(costs, passes)
    parameter, element = _optimizer_rates(model, optimizer, clock)
    return StepRates(
        fixed=fixed, shared_flop=shared, own_flop=own, parameter=launch + parameter, element=element
    )


def probe_sets(costs: BackwardCosts) -> list[frozenset[str]]:
    """Sets that tell the rates apart: shallow and deep ones, with few parameters and with many."""
    order = from_the_output(costs, costs.fqns)
    depths = sorted({0, len(order) // 4, len(order) // 2, 3 * len(order) // 4, len(order) - 1})
    everything_down_to = [frozenset().union(*order[: depth + 1]) for depth in depths]
    only_at = [order[depth] for depth in depths[1:]]
    deepest = frozenset({max(sorted(costs.fqns), key=lambda fqn: _reach(costs, fqn))})
    return list(dict.fromkeys([costs.fqns, *everything_down_to, *only_at, deepest]))


def _reach(costs: BackwardCosts, fqn: str) -> int:
    """FLOPs of the activation gradients that training this parameter alone needs, less its own FLOPs."""
    shared, own = _backward_flops(costs, frozenset({fqn}))
    return shared - own


def _time_passes(
    model: nn.Module, sets: Sequence[frozenset[str]], forward: Callable[[], torch.Tensor], clock: Clock
) -> dict[frozenset[str], float]:
    """Median seconds of forward and backward with each set, the sets taking turns."""
    times: dict[frozenset[str], list[float]] = {trained: [] for trained in sets}
    device = next(model.parameters()).device

    def run() -> None:
        with torch.enable_grad():
            loss = forward()
        with torch.autocast(device.type, enabled=False):  # autocast is for the forward alone
            loss.backward()

    order, start = list(sets), time.perf_counter()
    with restored(unwrap(model)):
        for done in range(ROUNDS[1]):
            if done >= ROUNDS[0] and time.perf_counter() - start > ENOUGH_S:
                break
            for trained in order:
                with temporarily_training(model, trained):
                    run()  # the first one compiles; and the one after a change of sets is slower
                    _forget_gradients(model)
                    times[trained].append(_seconds(run, device, clock))
                    _forget_gradients(model)
            order.reverse()
    return {trained: statistics.median(found) for trained, found in times.items()}


def _forget_gradients(model: nn.Module) -> None:
    for parameter in unwrap(model).parameters():
        parameter.grad = None


def _seconds(function: Callable[[], object], device: torch.device, clock: Clock) -> float:
    wait: Callable[[], object] = functools.partial(torch.cuda.synchronize, device)
    wait = wait if device.type == "cuda" else lambda: None
    wait()
    start = clock()
    function()
    wait()
    return clock() - start


def _fit(costs: BackwardCosts, times: Mapping[frozenset[str], float]) -> tuple[float, float, float, float]:
    """Fit rates, none of them negative, to the times, in relative errors."""
    features = np.array([[1.0, *_backward_flops(costs, trained), len(trained)] for trained in times])
    seconds = np.array(list(times.values()))
    scale = np.maximum(features.max(axis=0), 1.0)
    rates, _ = nnls(features / scale / seconds[:, None], np.ones(len(seconds)))
    worst = float(np.abs(features / scale @ rates / seconds - 1).max())
    if worst > _POOR_FIT:
        logger.warning(
            "budget_seconds: a timed step differs by %.0f %% from what the rates predict; "
            "was the machine busy with something else?",
            100 * worst,
        )
    fixed, shared, own, launch = (float(rate) for rate in rates / scale)
    return fixed, shared, own, launch


def _backward_flops(costs: BackwardCosts, trained: frozenset[str]) -> tuple[int, int]:
    """FLOPs of the backward that several parameters share, and those that one parameter needs alone."""
    done = [work for work in costs.shared_work if not work.parameters.isdisjoint(trained)]
    own = sum(work.flops for work in done if len(work.parameters) == 1)
    return sum(work.flops for work in done) - own, own


def _optimizer_rates(model: nn.Module, optimizer: Optimizer, clock: Clock) -> tuple[float, float]:
    """Seconds of an optimizer step per parameter and per element, timed on copies of some parameters."""
    shadow = ShadowOptimizer(optimizer)
    owned = sorted(filter(shadow.owns, unwrap(model).parameters()), key=lambda parameter: parameter.numel())
    if not owned:
        return 0.0, 0.0
    small = owned[:_MOST_PARAMETERS]
    large = list(_up_to(reversed(owned), _MOST_ELEMENTS))
    of_small, of_large = (_time_optimizer(shadow, sample, clock) for sample in (small, large))
    elements = [sum(parameter.numel() for parameter in sample) for sample in (small, large)]
    features = np.array([[len(small), elements[0]], [len(large), elements[1]]], dtype=float)
    seconds = np.array([of_small, of_large])
    rates, _ = nnls(features / seconds[:, None], np.ones(2))
    return float(rates[0]), float(rates[1])


def _up_to(parameters: Iterable[nn.Parameter], most: int) -> Iterator[nn.Parameter]:
    """The first parameters, until they have so many elements."""
    elements = 0
    for parameter in parameters:
        if elements < most:
            yield parameter
        elements += parameter.numel()


def _time_optimizer(shadow: ShadowOptimizer, sample: Sequence[nn.Parameter], clock: Clock) -> float:
    step = shadow.stepper(sample)
    device = sample[0].device
    return statistics.median(_seconds(step, device, clock) for _ in range(ROUNDS[1]))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * NANOSECONDS)
