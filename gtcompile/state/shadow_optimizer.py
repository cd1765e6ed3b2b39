"""Compute an optimizer's next update of one parameter, without changing parameter or optimizer."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class ShadowOptimizer:
    """Steps copies of parameters, with the optimizer's own update rule, moments and hyperparameters.

    The optimizer itself is only read. The extra memory is a small multiple of the parameters that are stepped
    together: their copies, copies of their moments, and temporary tensors.

    In the first step of a warm-up the learning rate is 0, so every update would be 0. If the `lr` of a group
    is 0, its `initial_lr` is used instead, which learning rate schedulers set.

    Args:
        optimizer: any `torch.optim.Optimizer` that updates each parameter independently; also a wrapper with
            one in `.optimizer`, such as accelerate's.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        ValueError: its step needs a closure (LBFGS), or every learning rate is 0.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = innermost(optimizer)
        _refuse_closure(self._optimizer)
        groups = [(_moving(group), group["params"]) for group in self._optimizer.param_groups]
        self._groups = {parameter: group for group, parameters in groups for parameter in parameters}
        if all(_is_zero(group.get("lr")) for group, _ in groups):
            raise ValueError(
                f"every learning rate of this {type(self._optimizer).__name__} is 0 and no scheduler left an "
                f"initial_lr, so no update could reduce the loss; set a learning rate"
            )

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer updates this parameter."""
        return parameter in self._groups

    def group_of(self, parameter: nn.Parameter) -> int:
        """Return a number that parameters of one group share, and only they."""
        return id(self._groups[parameter])

    def stepped(self, parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
        """Return the parameter's value after the optimizer's next step, as a new tensor.

        Args:
            parameter: one that the optimizer owns.
            gradient: has the parameter's shape, on any device. The optimizer may overwrite it.
        """
        twins, _ = self._step({parameter: gradient})
        return twins[parameter].detach()

    def state_after(self, parameter: nn.Parameter, gradient: torch.Tensor) -> dict[str, Any]:
        """Return the parameter's state after one step, as new tensors. Arguments as in `stepped`."""
        twins, shadow = self._step({parameter: gradient})
        return dict(shadow.state[twins[parameter]])

    def stepper(self, parameters: Iterable[nn.Parameter]) -> Callable[[], object]:
        """Return a function that steps copies of some parameters together, again and again, to be timed.

        Args:
            parameters: ones that the optimizer owns. The gradients of their copies are zero.
        """
        _, shadow = self._step({parameter: torch.zeros_like(parameter) for parameter in parameters})
        return torch.no_grad()(shadow.step)

    @torch.no_grad()
    def updates(self, gradients: Mapping[nn.Parameter, torch.Tensor]) -> dict[nn.Parameter, torch.Tensor]:
        """Return the changes that the optimizer's next step makes to some parameters.

        Weight decay is included, because freezing a parameter stops its decay too. (It could be separated
        only if it is decoupled: in SGD, decay goes through the momentum.)

        Args:
            gradients: by parameter, as in `stepped`.
        """
        twins, _ = self._step(gradients)
        return {parameter: twin.detach().sub_(parameter) for parameter, twin in twins.items()}

    @torch.no_grad()
    def _step(
        self, gradients: Mapping[nn.Parameter, torch.Tensor]
    ) -> tuple[dict[nn.Parameter, nn.Parameter], Optimizer]:
        """Return a stepped copy of each parameter, and the optimizer that stepped them."""
        twins = {}
        for parameter, gradient in gradients.items():
            twin = twins[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            twin.grad = gradient.to(parameter.device)
        shadow = self._shadow(twins)
        shadow.step()
        return twins, shadow

    def _shadow(self, twins: Mapping[nn.Parameter, nn.Parameter]) -> Optimizer:
        """Create an optimizer of the same class for the twins alone, as unpickling would, without `__init__`.

        Hooks are left out, and so are wrappers that schedulers or compilers put around `step`.
        """
        own = {
            name: value
            for name, value in vars(self._optimizer).items()
            if name != "step" and not name.endswith("_hooks")
        }
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        groups: dict[int, dict[str, Any]] = {}
        for parameter, twin in twins.items():
            if kept := self._optimizer.state.get(parameter):
                state[twin] = {name: _copied(value, parameter.device) for name, value in kept.items()}
            group = self._groups[parameter]
            groups.setdefault(id(group), {**group, "params": []})["params"].append(twin)
        own |= {"state": state, "param_groups": list(groups.values())}
        shadow = object.__new__(type(self._optimizer))
        shadow.__setstate__(own)
        return shadow


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside wrappers that store it in `.optimizer`.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    inner = getattr(optimizer, "optimizer", None)
    return innermost(inner) if isinstance(inner, Optimizer) else optimizer


def _refuse_closure(optimizer: Optimizer) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(optimizer).__name__} steps all parameters together and calls the model itself, so no "
            f"parameter has an update of its own; use an optimizer such as AdamW"
        )


def _moving(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's hyperparameters, with the initial learning rate if the current one is 0."""
    starts = _is_zero(group.get("lr")) and "initial_lr" in group
    return {**group, "lr": group["initial_lr"]} if starts else group


def _is_zero(rate: float | torch.Tensor | None) -> bool:
    return rate is not None and bool(rate == 0)


def _copied(value: Any, device: torch.device) -> Any:
    """Copy a value to the parameter's device: the state of a frozen parameter may be in host memory.

    A wrapper subclass (8-bit moments) is copied part by part, because it may not support copies between
    devices.
    """
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        kind: Any = type(value)
        names, context = value.__tensor_flatten__()
        parts = {name: _copied(getattr(value, name), device) for name in names}
        return kind.__tensor_unflatten__(parts, context, value.size(), value.stride())
    if isinstance(value, torch.Tensor) and value.dim() and value.device != device:
        return value.to(device)
    return copy.deepcopy(value)
