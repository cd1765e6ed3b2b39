"""Helpers for your own tests: reference gradients by eager autograd, and a comparison with them."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from gtcompile.capture.model_io import loss_of, unwrap
from gtcompile.state.restore import flags_kept, restored
from gtcompile.state.trained_set import trained_parameters
from gtcompile.torch_internals import REENTRANT_CHECKPOINT_NODE

Gradients = Sequence[torch.Tensor | None]


def reference_gradients(
    model: nn.Module, batch: Mapping[str, Any], trained: Iterable[str] | None = None
) -> dict[str, torch.Tensor]:
    """Compute the gradients of one batch by eager autograd, with `requires_grad=False` on frozen parameters.

    Parameters, their gradients, buffers and random state are left as they were, so the next step draws the
    same dropout masks.

    Args:
        model: compiled or not; it runs eagerly here.
        batch: keyword dictionary of the model's forward, labels included.
        trained: FQNs of the trained parameters, tied ones under their first name; None for the current
            trained set.

    Returns:
        FQN -> gradient, of the parameter's shape, for the trained parameters that the loss depends on.

    Raises:
        ValueError: a name in `trained` is not a parameter of the model.
    """
    chosen = trained_parameters(model) if trained is None else frozenset(trained)
    inner = unwrap(model)
    parameters = dict(inner.named_parameters())
    unknown = sorted(chosen - parameters.keys())
    if unknown:
        raise ValueError(f"no parameter is called {', '.join(unknown)}")
    wanted = {name: parameters[name] for name in sorted(chosen)}
    gradients = _eager_step(inner, batch, wanted)
    return {name: gradient for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None}


def _eager_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    wanted: Mapping[str, nn.Parameter],
) -> Gradients:
    with restored(model), flags_kept(model), torch.compiler.set_stance("force_eager"):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        loss = loss_of(model(**batch))
        if not loss.requires_grad:  # the loss depends on none of them
            return [None] * len(wanted)
        differentiate = _by_backward if _is_checkpointed_reentrantly(loss) else _by_grad
        return differentiate(loss, list(wanted.values()))


def _is_checkpointed_reentrantly(loss: torch.Tensor) -> bool:
    """Whether the graph behind a loss has reentrant checkpoints, which `autograd.grad` cannot see into."""
    todo, seen = [loss.grad_fn], {loss.grad_fn}
    while todo:
        node = todo.pop()
        if node is None:
            continue
        if node.name() == REENTRANT_CHECKPOINT_NODE:
            return True
        parents = {parent for parent, _ in node.next_functions} - seen
        seen |= parents
        todo.extend(parents)
    return False


def _by_grad(loss: torch.Tensor, parameters: list[nn.Parameter]) -> Gradients:
    """Gradients by `autograd.grad`, which leaves `.grad` alone and runs no hook of a parameter."""
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _by_backward(loss: torch.Tensor, parameters: list[nn.Parameter]) -> Gradients:
    """Gradients by `backward` and `.grad`, as reentrant checkpointing needs; hooks of parameters run."""
    loss.backward()
    return [parameter.grad for parameter in parameters]


def assert_same_gradients(
    actual: nn.Module | Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Check that exactly the expected parameters have a gradient, and that the gradients are equal.

    Args:
        actual: a model after its backward, or its gradients by FQN.
        expected: what `reference_gradients` returned.
        rtol: relative tolerance; 0 holds with the "eager" compiler.
        atol: absolute tolerance.

    Raises:
        AssertionError: names the parameters that have a gradient they should not have, lack one, or have
            a different one.
    """
    gradients = _gradients(actual) if isinstance(actual, nn.Module) else dict(actual)
    extra, missing = sorted(gradients.keys() - expected.keys()), sorted(expected.keys() - gradients.keys())
    if extra or missing:
        raise AssertionError(f"gradients of the wrong parameters: unexpected {extra}, missing {missing}")
    for fqn, gradient in expected.items():
        torch.testing.assert_close(
            gradients[fqn], gradient, rtol=rtol, atol=atol, msg=partial("gradient of {}: {}".format, fqn)
        )


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = unwrap(model).named_parameters()
    return {fqn: parameter.grad for fqn, parameter in named if parameter.grad is not None}
