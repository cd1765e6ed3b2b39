"""The operators and modules of PyTorch's test databases, each as a small model with a sample of inputs."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

from gtcompile.graph.flops import count_flops

Form = Literal["plain", "graph break", "in place"]
FORMS: tuple[Form, ...] = ("plain", "graph break", "in place")
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.bfloat16)
"""Types of samples, the preferred one first."""
SAMPLES_READ = 40
"""Of a subject's samples, how many are looked at to choose from."""


class Slot(NamedTuple):
    """Stands in a sample's arguments for a tensor that became a parameter or a buffer of the model."""

    name: str
    scaled: bool
    """Whether the tensor is an activation: multiplied by a trained scalar before it is used."""


class Applied(nn.Module):
    """A function between two trained scalars; each tensor of its sample that can be trained is a parameter.

    Args:
        function: takes the sample's arguments; a module brings its own parameters and buffers.
        args: of the function.
        kwargs: of the function.
        activations: how many of the positional arguments are multiplied by the first scalar.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        activations: int,
    ) -> None:
        super().__init__()
        self.function = function
        self.before, self.after = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        numbers = itertools.count()
        self.args = [self._keep(value, numbers, i < activations) for i, value in enumerate(args)]
        self.kwargs = {name: self._keep(value, numbers, False) for name, value in kwargs.items()}

    def _keep(self, value: Any, numbers: Iterator[int], scaled: bool) -> Any:
        if isinstance(value, torch.Tensor):
            slot = Slot(f"tensor{next(numbers)}", scaled and value.requires_grad)
            if value.requires_grad:
                self.register_parameter(slot.name, nn.Parameter(value.detach().clone()))
            else:
                self.register_buffer(slot.name, value.clone())
            return slot
        if isinstance(value, dict):
            return {name: self._keep(part, numbers, scaled) for name, part in value.items()}
        if isinstance(value, (tuple, list)):
            return _like(value, [self._keep(part, numbers, scaled) for part in value])
        return value

    def _fill(self, value: Any, scale: torch.Tensor) -> Any:
        if isinstance(value, Slot):
            tensor = getattr(self, value.name)
            return tensor * scale if value.scaled else tensor
        if isinstance(value, dict):
            return {name: self._fill(part, scale) for name, part in value.items()}
        if isinstance(value, (tuple, list)):
            return _like(value, [self._fill(part, scale) for part in value])
        return value

    def prepare(self, unit: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
        """The function's arguments; `unit` is 1, with shape []."""
        scale = self.before * unit
        kwargs = {name: self._fill(value, scale) for name, value in self.kwargs.items()}
        return [self._fill(value, scale) for value in self.args], kwargs

    def copy(self) -> "Applied":
        """A deep copy. `nn.Parameter` cannot copy one in a compressed sparse layout by itself."""
        parameters = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in self.parameters()}
        return copy.deepcopy(self, parameters)

    def finish(self, args: list[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        """Apply the function; a loss of shape []."""
        return weighted_sum(self.function(*args, **kwargs)) * self.after


class Together(nn.Module):
    """Functions side by side; the loss is the sum of theirs.

    Args:
        members: the functions.
        form: where graphs break.
    """

    def __init__(self, members: Iterable[Applied], form: Form) -> None:
        super().__init__()
        self.members, self.breaks = nn.ModuleList(members), form == "graph break"

    def forward(self, unit: torch.Tensor) -> torch.Tensor:
        """Apply all functions; `unit` is 1. Input and output have shape []."""
        given = [member.prepare(unit) for member in self.members]
        if self.breaks:
            torch._dynamo.graph_break()
        losses = [member.finish(*one) for member, one in zip(self.members, given, strict=True)]
        return sum(losses, torch.zeros(()))


def _like(value: Sequence[Any], parts: list[Any]) -> Any:
    """A container of the type of `value` with these parts."""
    if hasattr(value, "_fields"):
        return type(value)(*parts)
    return tuple(parts) if isinstance(value, tuple) else parts


def weighted_sum(result: Any) -> torch.Tensor:
    """Sum over all floating-point tensors in nested containers; every element has another weight.

    The weights of three numbers are 0.5, 1.25 and 2, of which no two add up to the third: determinants of the
    same size and different sign must not cancel out, which would leave nothing but rounding to compare.
    """
    if isinstance(result, (tuple, list)):
        return sum((weighted_sum(part) for part in result), torch.zeros(()))
    if not isinstance(result, torch.Tensor):
        return torch.zeros(())
    tensor = result.to_dense() if result.layout != torch.strided else result
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return torch.zeros(())
    return (tensor.flatten() * torch.linspace(0.5, 2.0, tensor.numel(), dtype=tensor.dtype)).sum()


@dataclass(frozen=True, slots=True)
class Subject:
    """An operator or a module."""

    name: str
    """As in its database; a module's begins with `nn.`."""
    build: Callable[[Form], Applied | None]
    """Makes the model of a form; None where the form does not apply."""


def subjects() -> dict[str, Subject]:
    """All differentiable operators and all modules, by name."""
    found = [_of_operator(info) for info in op_db if info.supports_autograd]
    found += [_of_module(info) for info in module_db]
    return {subject.name: subject for subject in found}


def _of_operator(info: Any) -> Subject:
    name = f"{info.name} ({info.variant_test_name})" if info.variant_test_name else info.name

    def build(form: Form) -> Applied | None:
        function = info.inplace_variant if form == "in place" else info.op
        supported = info.supported_backward_dtypes("cpu")
        if function is None or not supported:
            return None
        dtype = next((dtype for dtype in DTYPES if dtype in supported), next(iter(supported)))
        samples = itertools.islice(info.sample_inputs("cpu", dtype, requires_grad=True), SAMPLES_READ)
        fitting = [s for s in samples if form != "in place" or not s.broadcasts_input]
        sample = _richest([Candidate(info.op, (s.input, *s.args), s.kwargs, s) for s in fitting]).sample

        def apply(*args: Any, **kwargs: Any) -> Any:
            return sample.output_process_fn_grad(function(*args, **kwargs))

        return Applied(apply, (sample.input, *sample.args), sample.kwargs, 1)

    return Subject(name, build)


def _of_module(info: Any) -> Subject:
    def build(form: Form) -> Applied | None:
        if form == "in place":
            return None
        dtype = torch.float32 if torch.float32 in info.dtypes else next(iter(info.dtypes))
        inputs = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True)
        fitting = [i for i in itertools.islice(inputs, SAMPLES_READ) if i.forward_input is not None]
        made = [_constructed(info.module_cls, i.constructor_input).to(dtype) for i in fitting]
        called = [i.forward_input for i in fitting]
        module, args, kwargs, _ = _richest(
            [Candidate(m, c.args, c.kwargs, c) for m, c in zip(made, called, strict=True)]
        )
        return Applied(module, args, kwargs, len(args))

    return Subject(info.name, build)


def _constructed(kind: Callable[..., nn.Module], given: Any) -> nn.Module:
    return kind(*given.args, **given.kwargs)


class Candidate(NamedTuple):
    """A function and one sample of its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sample: Any
    """As in the database."""


def _richest(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the most trainable tensors; of these with the most FLOPs; then the largest.

    A module is called to count its FLOPs, which also creates the parameters of a lazy one.
    """
    sizes = [_trainable((candidate.args, candidate.kwargs)) for candidate in candidates]
    most = max(count for count, _ in sizes)
    found = [
        (_flops(each), size, each)
        for each, (count, size) in zip(candidates, sizes, strict=True)
        if count == most
    ]
    return max(found, key=lambda each: each[:2])[2]


def _flops(candidate: Candidate) -> int:
    with count_flops() as counter:
        candidate.function(*candidate.args, **candidate.kwargs)
    return counter.get_total_flops()


def _trainable(value: Any) -> tuple[int, int]:
    """How many trainable tensors are in nested containers, and how large they are."""
    if isinstance(value, torch.Tensor):
        return (1, value.numel()) if value.requires_grad and value.numel() else (0, 0)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    found = [_trainable(part) for part in parts]
    return sum(count for count, _ in found), sum(size for _, size in found)
