"""What a training step takes in seconds and bytes, for budgets beside FLOPs."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture.model_io import LossFunction, unwrap, without_replicas
from gtcompile.costs.backward_costs import costs_of
from gtcompile.costs.dependency_graph import capture_everything
from gtcompile.costs.prices import Price, SharedAmount, StepPrices, make_price
from gtcompile.distributed import fsdp
from gtcompile.prices.saved_values import compiled_parts, saved_values
from gtcompile.prices.step_timing import measure_rates
from gtcompile.state.optimizer_state import Setting, check_setting
from gtcompile.state.parameter_records import was_trainable
from gtcompile.state.shadow_optimizer import ShadowOptimizer, innermost

State = dict[str, Any]


def step_prices(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    frozen_state: Setting = "keep",
    seconds: bool = True,
    memory: bool = True,
) -> StepPrices:
    """Find out what a training step takes in seconds and bytes, for any set of trained parameters.

    Bytes are computed from the captured graph: values saved for the backward, gradients, and the state of the
    optimizer. Seconds are measured: steps with a few trained sets are timed, which takes about as long as
    forty of them. Weights, moments, gradients, buffers and random state are as they were afterwards.

    Args:
        model: as it will be trained: with or without compiled blocks, on its device.
        optimizer: the one that trains it.
        batch: as for `backward_costs`; prices hold for its shapes.
        loss_fn: as for `backward_costs`.
        frozen_state: as for `AdaptiveBackprop`: where the optimizer's state of frozen parameters goes.
        seconds: whether to measure seconds.
        memory: whether to compute bytes.

    Raises:
        CaptureError: the model cannot be captured.
        ValueError: the model is sharded, or is on the meta device.
    """
    check_setting(frozen_state)
    model = without_replicas(model)
    refuse_sharded(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is on the meta device, without weights; prices need the model as it is trained"
        )
    joint = capture_everything(model, batch, loss_fn)
    costs = costs_of(joint)
    rates = measure_rates(model, optimizer, batch, costs, loss_fn) if seconds else None
    saved = saved_values(joint, compiled_parts(model)) if memory else ()
    return StepPrices(
        nanoseconds=None if rates is None else rates.price(costs),
        memory=memory_price(model, optimizer, saved, frozen_state) if memory else None,
    )


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model that is sharded over processes.

    Raises:
        ValueError: its parameters are sharded by `fully_shard`.
    """
    if any(True for _ in fsdp.shards(unwrap(model))):
        raise ValueError(
            "budgets in seconds and bytes know nothing of shards; give a model sharded with fully_shard a "
            "budget_fraction alone"
        )


def memory_price(
    model: nn.Module,
    optimizer: Optimizer,
    saved: Iterable[SharedAmount],
    frozen_state: Setting,
    further_bytes: int = 0,
) -> Price:
    """Bytes beside the weights for any set of trained parameters.

    Args:
        model: whose parameters are trained.
        optimizer: the one that trains them.
        saved: bytes saved for the backward.
        frozen_state: where the state of frozen parameters goes. State that stays in the parameters' memory
            counts for every set.
        further_bytes: what every set takes in addition.
    """
    shadow, state = ShadowOptimizer(optimizer), innermost(optimizer).state
    sizes: dict[object, int] = {}
    fixed, shared = further_bytes, list(saved)
    for fqn, parameter in _selectable(model):
        own = parameter.numel() * parameter.element_size()  # its gradient
        if not shadow.owns(parameter):
            shared.append(SharedAmount(own, frozenset({fqn})))
            continue
        exists = bool(state.get(parameter))
        of_state = _bytes_in(state[parameter]) if exists else _new_state_bytes(shadow, parameter, sizes)
        if exists and _stays(parameter, frozen_state):
            fixed += of_state
        else:
            own += of_state
        shared.append(SharedAmount(own, frozenset({fqn})))
    return make_price(fixed, shared)


def _stays(parameter: nn.Parameter, frozen_state: Setting) -> bool:
    """Whether the state of this parameter takes the same memory while it is frozen."""
    return frozen_state == "keep" or (frozen_state == "cpu" and parameter.device.type == "cpu")


def _selectable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that can be trained, frozen now or not, by FQN."""
    return (pair for pair in unwrap(model).named_parameters() if was_trainable(pair[1]))


def _new_state_bytes(shadow: ShadowOptimizer, parameter: nn.Parameter, sizes: dict[object, int]) -> int:
    """Bytes of the state that the optimizer makes for a parameter, found out once for each shape."""
    key = shadow.group_of(parameter), parameter.shape, parameter.dtype
    if key not in sizes:
        sizes[key] = _bytes_in(shadow.state_after(parameter, torch.zeros_like(parameter)))
    return sizes[key]


def _bytes_in(state: State) -> int:
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
