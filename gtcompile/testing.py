"""The oracles gtcompile is tested against, for your own tests: eager gradients and what must equal them."""

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
    """Gradients of one batch by eager autograd, `requires_grad=False` on everything that is not trained.

    Nothing changes: parameters, their gradients, buffers, and random state are as before, so that a step
    taken next draws the same dropout masks.

    Args:
        model: compiled or not; runs eagerly here.
        batch: keyword dictionary of the model's forward, labels included.
        trained: FQNs, each under its first name; None for those trained now.

    Returns:
        FQN -> gradient, for the trained parameters the loss depends on.
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
        if not loss.requires_grad:  # none of them was used
            return [None] * len(wanted)
        differentiate = _accumulated if _is_checkpointed_reentrantly(loss) else _handed_out
        return differentiate(loss, list(wanted.values()))


def _is_checkpointed_reentrantly(loss: torch.Tensor) -> bool:
    """Whether reentrant checkpoints hide part of the history, which `autograd.grad` overlooks."""
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


def _handed_out(loss: torch.Tensor, parameters: list[nn.Parameter]) -> Gradients:
    """Gradients by a backward that touches no `.grad` and runs no hook of a parameter."""
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _accumulated(loss: torch.Tensor, parameters: list[nn.Parameter]) -> Gradients:
    """Gradients by `.grad`, for reentrant checkpointing knows no other way; hooks of parameters run."""
    loss.backward()
    return [parameter.grad for parameter in parameters]


def assert_same_gradients(
    actual: nn.Module | Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Check that exactly the expected parameters have a gradient, and the right one.

    Args:
        actual: a model after its backward, or its gradients by FQN.
        expected: as `reference_gradients` returns it.
        rtol: relative tolerance; with the "eager" compiler 0 holds.
        atol: absolute tolerance.

    Raises:
        AssertionError: naming the parameters that have a gradient and should not, lack one, or have another.
    """
    gradients = _gradients(actual) if isinstance(actual, nn.Module) else dict(actual)
    extra, missing = sorted(gradients.keys() - expected.keys()), sorted(expected.keys() - gradients.keys())
    if extra or missing:
        raise AssertionError(f"gradients of the wrong parameters: unexpected {extra}, missing {missing}")
    for fqn, gradient in expected.items():
        torch.testing.assert_close(
            gradients[fqn],
            gradient,
            rtol=rtol,
            atol=atol,
            msg=partial(_say_whose, fqn),
        )


def _say_whose(fqn: str, text: str) -> str:
    return f"gradient of {fqn}: {text}"


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = unwrap(model).named_parameters()
    return {fqn: parameter.grad for fqn, parameter in named if parameter.grad is not None}
