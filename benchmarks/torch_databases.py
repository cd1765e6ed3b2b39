"""Train every operator and module of PyTorch's own test databases: `python -m benchmarks.torch_databases`.

A *subject* is a differentiable operator of `op_db` or a module of `module_db`. It is applied to its sample
inputs, between two trained scalars, in up to three *forms*: plain, behind a graph break, and in place. Each
form is compiled with both kinds of variants and trains random sets. Eager PyTorch says what is right.

Several subjects make one model, which is split in halves where something is not right.
"""

import copy
import dataclasses
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils.flop_counter import FlopCounterMode

from gtcompile import CaptureError, backward_costs, train_only
from gtcompile.graph.flops import count_flops
from gtcompile.torch_internals import dynamo_config, dynamo_counters

Form = Literal["plain", "graph break", "in place"]
FORMS: tuple[Form, ...] = ("plain", "graph break", "in place")
Backend = Literal["specialized", "hoisted", "aot_eager"]
VARIANTS: tuple[Backend, ...] = ("specialized", "hoisted")
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.bfloat16)
"""Types of samples, the preferred one first."""
SAMPLES_READ = 40
"""Of a subject's samples, how many are looked at to choose from."""
SETS: Mapping[Form, int] = {"plain": 2, "graph break": 1, "in place": 1}
"""How many random trained sets of each form are tried."""
TOGETHER = 8
"""How many subjects make one model."""
ROUNDING = 32
"""Greatest allowed difference of a tensor, in units of its greatest element and of its type's precision."""
SEED = 0


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
    """Sum over all floating-point tensors in nested containers; every element has another weight."""
    if isinstance(result, (tuple, list)):
        return sum((weighted_sum(part) for part in result), torch.zeros(()))
    if not isinstance(result, torch.Tensor):
        return torch.zeros(())
    tensor = result.to_dense() if result.layout != torch.strided else result
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return torch.zeros(())
    return (tensor.flatten() * torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype)).sum()


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
        sample = max(fitting, key=lambda s: _richness((s.input, s.args, s.kwargs)))

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
        sample = max(fitting, key=lambda i: _richness((i.forward_input.args, i.forward_input.kwargs)))
        made, called = sample.constructor_input, sample.forward_input
        module = info.module_cls(*made.args, **made.kwargs).to(dtype)
        module(*called.args, **called.kwargs)  # creates the parameters of a lazy module
        return Applied(module, called.args, called.kwargs, len(called.args))

    return Subject(info.name, build)


def _richness(value: Any) -> tuple[int, int]:
    """How many trainable tensors are in nested containers, and how large they are."""
    if isinstance(value, torch.Tensor):
        return (1, value.numel()) if value.requires_grad and value.numel() else (0, 0)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    found = [_richness(part) for part in parts]
    return sum(count for count, _ in found), sum(size for _, size in found)


@functools.lru_cache(4 * TOGETHER)
def working(subject: Subject, form: Form) -> Applied | None:
    """Build a form of a subject; None where it does not apply, or eager PyTorch cannot train it.

    Some operators of the database seed the random generator themselves, at which Dynamo breaks the graph.
    Here they do not: every step is seeded from outside.
    """

    def unseeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    with mock.patch.object(common_methods_invocations, "wrapper_set_seed", unseeded):
        torch.manual_seed(SEED)
        made = subject.build(form)
    if made is None:
        return None
    alone = Together([copy_of(made)], form)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step(alone, alone, FlopCounterMode(display=False))
    except Exception:
        return None
    return made


def model_of(members: Iterable[Subject], form: Form) -> Together:
    """A new model of those subjects that the form applies to; it may have no member."""
    found = (working(member, form) for member in members)
    return Together([copy_of(member) for member in found if member is not None], form)


def copy_of(member: Applied) -> Applied:
    """A deep copy. `nn.Parameter` itself cannot copy parameters in compressed sparse formats."""
    parameters = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in member.parameters()}
    return copy.deepcopy(member, parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one training step does."""

    requires_grad: bool
    """Whether the loss requires grad."""
    values: Mapping[str, torch.Tensor | None]
    """The loss, the gradients of all parameters, and the buffers after the step."""
    flops: int


UNIT = {"unit": torch.ones(())}


def step(run: nn.Module, model: nn.Module, counter: Any) -> Step:
    """Run one training step of a model, compiled or not, and count its FLOPs."""
    model.zero_grad()
    torch.manual_seed(SEED)
    with counter as counted:
        loss = run(**UNIT)
        if loss.requires_grad:
            loss.backward()
    values = {"the loss": loss.detach().clone()}
    values |= {f"the gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    values |= {f"the buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return Step(
        requires_grad=loss.requires_grad,
        values={name: None if value is None else value.clone() for name, value in values.items()},
        flops=counted.get_total_flops(),
    )


def difference(actual: Step, expected: Step) -> str:
    """The first difference between two steps in words, FLOPs and rounding aside; empty if there is none."""
    if actual.requires_grad != expected.requires_grad:
        return f"the loss {'requires' if actual.requires_grad else 'does not require'} grad"
    for name, value in expected.values.items():
        other = actual.values[name]
        if (other is None) != (value is None):
            return f"{name} is {'None' if other is None else 'not None'}"
        if value is not None and other is not None and (distance := _distance(other, value)) > ROUNDING:
            return f"{name} differs by {distance:.1e} units of rounding"
    return ""


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Greatest difference, in units of the greatest element and of the type's precision.

    It is infinite for tensors of two kinds, and for infinite elements or NaN in one of them alone.
    """
    if (left.shape, left.dtype, left.layout) != (right.shape, right.dtype, right.layout):
        return float("inf")
    left, right = left.to_dense(), right.to_dense()
    finite = left.isfinite() & right.isfinite()
    same = (left == right) | (left.isnan() & right.isnan())
    if not bool((finite | same).all()):
        return float("inf")
    if bool(same.all()):
        return 0.0
    exact = torch.finfo(left.dtype).eps if left.is_floating_point() or left.is_complex() else 1
    largest = right.masked_fill(~finite, 0).abs().max()
    apart = left.masked_fill(~finite, 0) - right.masked_fill(~finite, 0)
    return float(apart.abs().max() / largest / exact)


def random_sets(model: nn.Module, form: Form) -> list[frozenset[str]]:
    """Random trained sets, the same every time."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    draw = random.Random(SEED)
    sizes = [draw.randint(1, max(1, len(names) - 1)) for _ in range(SETS[form])]
    return [frozenset(draw.sample(names, size)) for size in sizes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How one form of a subject trained with one backend."""

    subject: str
    form: Form
    backend: Backend
    difference: str = ""
    """What was not as in eager PyTorch, or the error; empty if nothing."""
    flops: str = ""
    """Where other FLOPs were counted than in eager PyTorch; empty if nowhere."""
    graphs: int = 0
    """How many graphs were captured; 0 if the model ran eagerly."""

    @property
    def right(self) -> bool:
        """Whether everything is as in eager PyTorch."""
        return not (self.difference or self.flops)

    def __str__(self) -> str:
        said = " ".join(filter(None, (self.difference, self.flops))) or "right"
        return f"{self.subject}, {self.form}, {self.backend}: {said}"


def check(members: Sequence[Subject], form: Form, backend: Backend) -> list[Result]:
    """Train a form of some subjects and compare with eager PyTorch.

    Errors of the backend do not raise; they are part of the result.

    Returns:
        One result for each subject that the form applies to.
    """
    members = [member for member in members if working(member, form) is not None]
    if not members:
        return []
    found = _check_together(members, form, backend)
    if len(members) == 1 or (found.right and found.graphs):
        return [dataclasses.replace(found, subject=member.name) for member in members]
    middle = len(members) // 2
    return [r for half in (members[:middle], members[middle:]) for r in check(half, form, backend)]


def _check_together(members: Sequence[Subject], form: Form, backend: Backend) -> Result:
    torch.compiler.reset()
    dynamo_counters.clear()
    result = Result(subject="", form=form, backend=backend)
    # one function serves all members, so with graph breaks Dynamo captures it once for each
    with dynamo_config.patch(recompile_limit=64), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = _compare(model_of(members, form), model_of(members, form), backend, result)
        except Exception as error:
            result = dataclasses.replace(result, difference=said(error))
    return dataclasses.replace(result, graphs=dynamo_counters["stats"]["unique_graphs"])


def said(error: BaseException) -> str:
    """An error in one line."""
    error = getattr(error, "inner_exception", None) or error
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _compare(model: nn.Module, twin: nn.Module, backend: Backend, result: Result) -> Result:
    run = compiled(model, backend)
    step(run, model, count_flops())  # regions learn which of their outputs are differentiated
    step(twin, twin, FlopCounterMode(display=False))
    for trained in random_sets(twin, result.form):
        freeze(run, model, trained, backend)
        freeze_eagerly(twin, trained)
        for _ in range(2):  # the first step may capture more, and find out what runs eagerly
            expected = step(twin, twin, FlopCounterMode(display=False))
            actual = step(run, model, count_flops())
            if differs := difference(actual, expected):
                where = f"{differs} ({_names(trained)} trained)"
                return dataclasses.replace(result, difference=where)
        if actual.flops != expected.flops and not result.flops:
            counted = f"{actual.flops:,} FLOPs, {expected.flops:,} in eager PyTorch"
            result = dataclasses.replace(result, flops=f"{counted} ({_names(trained)} trained)")
    return result


def _names(trained: Iterable[str]) -> str:
    return ", ".join(sorted(name.removeprefix("members.0.") for name in trained))


def compiled(model: nn.Module, backend: Backend) -> nn.Module:
    """The model, compiled without code generation."""
    if backend == "aot_eager":
        return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]
    options = {"compiler": "eager", "variants": backend}
    return torch.compile(model, backend="gtcompile", options=options)  # type: ignore[return-value]


def freeze(run: nn.Module, model: nn.Module, trained: Iterable[str], backend: Backend) -> None:
    """Train these parameters alone, each backend in its own way."""
    if backend == "aot_eager":
        freeze_eagerly(model, trained)
    else:
        train_only(run, trained)


def freeze_eagerly(model: nn.Module, trained: Iterable[str]) -> None:
    """Train these parameters alone, by their `requires_grad`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def predict(members: Sequence[Subject]) -> dict[str, str]:
    """By name of a subject, whether its costs are `exact` for random sets; if not, why."""
    members = [member for member in members if working(member, "plain") is not None]
    if not members:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _predict_together(members)
    if len(members) == 1 or found == EXACT:
        return dict.fromkeys((member.name for member in members), found)
    middle = len(members) // 2
    return predict(members[:middle]) | predict(members[middle:])


EXACT = "exact"


def _predict_together(members: Sequence[Subject]) -> str:
    twin = model_of(members, "plain")
    try:
        costs = backward_costs(model_of(members, "plain"), UNIT)
    except CaptureError as error:
        return f"refused: {said(error)}"
    for trained in random_sets(twin, "plain"):
        freeze_eagerly(twin, trained)
        counted = step(twin, twin, FlopCounterMode(display=False)).flops
        if (expected := costs.step_flops(trained & costs.fqns)) != counted:
            return f"{expected:,} predicted, {counted:,} counted ({_names(trained)} trained)"
    return EXACT


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything found out about one subject."""

    subject: str
    results: tuple[Result, ...]
    """One per form that applies and kind of variants."""
    upstream: Mapping[Form, str]
    """For each form with a wrong result: what `aot_eager` does wrong too; empty if nothing."""
    costs: str
    """`exact`, or why the costs are not."""

    @property
    def kind(self) -> str:
        """The best word that holds for all results: a key of `KINDS`."""
        wrong = [result for result in self.results if result.difference]
        if not self.results:
            return "not run"
        if any(not self.upstream[result.form] for result in wrong):
            return "wrong"
        if wrong:
            return "upstream"
        return "FLOPs" if any(result.flops for result in self.results) else "right"


KINDS = {
    "right": "right: gradients, None, buffers, `requires_grad` and FLOPs as in eager PyTorch",
    "FLOPs": "right, except for FLOPs",
    "upstream": "wrong where `aot_eager` is wrong too",
    "wrong": "wrong where `aot_eager` is right",
    "not run": "eager PyTorch cannot train the sample",
}
"""What each kind of report means."""


def examine(members: Sequence[Subject]) -> list[Report]:
    """Try all forms of some subjects with both kinds of variants, and their costs."""
    tried = [result for form in FORMS for backend in VARIANTS for result in check(members, form, backend)]
    costs = predict(members)
    reports = []
    for member in members:
        results = tuple(result for result in tried if result.subject == member.name)
        failed = dict.fromkeys(result.form for result in results if result.difference)
        upstream = {form: check([member], form, "aot_eager")[0].difference for form in failed}
        reports.append(
            Report(
                subject=member.name,
                results=results,
                upstream=upstream,
                costs=costs.get(member.name, "not run"),
            )
        )
    return reports


def markdown(reports: Sequence[Report]) -> str:
    """The numbers of operators and modules of each kind, and a list of everything that is not right."""
    kinds = [("operators", lambda r: not _is_module(r)), ("modules", _is_module)]
    columns = [[report for report in reports if belongs(report)] for _, belongs in kinds]
    lines = ["| | operators | modules |", "|---|---|---|"]
    lines.append(_row("tried", [len(column) for column in columns]))
    for kind, meaning in KINDS.items():
        lines.append(_row(meaning, [sum(r.kind == kind for r in column) for column in columns]))
    for word in ("exact", "refused"):
        lines.append(_row(f"costs {word}", [sum(r.costs.startswith(word) for r in c) for c in columns]))
    lines += ["", "| subject | form | variants | what happens | aot_eager |", "|---|---|---|---|---|"]
    for report in reports:
        for result in (result for result in report.results if not result.right):
            plain = report.upstream.get(result.form, "") if result.difference else ""
            said = " ".join(filter(None, (result.difference, result.flops)))
            lines.append(_row(result.subject, [result.form, result.backend, said, plain or "right"]))
        if report.costs not in ("exact", "not run"):
            lines.append(_row(report.subject, ["costs", "", report.costs, ""]))
    return "\n".join(lines) + "\n"


def _is_module(report: Report) -> bool:
    return report.subject.startswith("nn.") and not report.subject.startswith("nn.functional.")


def _row(first: str, cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in (first, *cells))} |"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Subjects to try. Default: all.")] = None,
) -> None:
    """Train every operator and module of PyTorch's test databases, and print a table in Markdown."""
    known, console = subjects(), Console(stderr=True)
    if unknown := set(names or ()) - known.keys():
        raise typer.BadParameter(f"no operator or module is called {', '.join(sorted(unknown))}")
    chosen = [known[name] for name in names or known]
    groups = [chosen[i : i + TOGETHER] for i in range(0, len(chosen), TOGETHER)]
    reports: list[Report] = []
    for group in track(groups, description="training", console=console):
        found = examine(group)
        reports += found
        wrong = [result for report in found if report.kind == "wrong" for result in report.results]
        console.print(*(result for result in wrong if not result.right), sep="\n", highlight=False)
    typer.echo(markdown(reports))


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
