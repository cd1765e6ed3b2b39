"""Compare forms of subjects with eager PyTorch: what compiled code computes, and what costs predict."""

import dataclasses
import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn
from torch.testing._internal import common_methods_invocations
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.torch_databases.steps import SEED, UNIT, Step, difference, step
from benchmarks.torch_databases.subjects import Applied, Form, Subject, Together
from gtcompile import CaptureError, backward_costs, train_only
from gtcompile.graph.flops import count_flops
from gtcompile.torch_internals import dynamo_config, dynamo_counters

Backend = Literal["specialized", "hoisted", "aot_eager"]
VARIANTS: tuple[Backend, ...] = ("specialized", "hoisted")
SETS: Mapping[Form, int] = {"plain": 2, "graph break": 1, "in place": 1}
"""How many random trained sets of each form are tried."""
STEPS = 2
"""How many steps are compared for each set. The first may capture more, and find out what runs eagerly."""
TOGETHER = 8
"""How many subjects make one model."""
EXACT, ZERO, FEWER, REFUSED = "exact", "zero", "fewer", "refused"
"""What costs can be: equal to counted FLOPs of eager PyTorch; equal and all zero; equal to those of compiled
code, which are fewer than in eager PyTorch; or refused."""


NO_TYPE = "the database names no type in which it is differentiable on a CPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A form of a subject, tried once in eager PyTorch."""

    member: Applied | None = None
    """None if the form does not apply, or eager PyTorch cannot train it."""
    failure: str = ""
    """Why eager PyTorch cannot train it; empty if it can, and if there is no such form."""
    flops: int = 0
    """Of a step that trains everything."""


@functools.lru_cache(4 * TOGETHER)
def built(subject: Subject, form: Form) -> Built:
    """Build a form of a subject, and train it for one step in eager PyTorch.

    Some operators of the database seed the random generator themselves, at which Dynamo breaks the graph.
    Here they do not: every step is seeded from outside.
    """

    def unseeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    with mock.patch.object(common_methods_invocations, "wrapper_set_seed", unseeded):
        torch.manual_seed(SEED)
        made = subject.build(form)
    if made is None:
        return Built(failure=NO_TYPE if form == "plain" else "")
    alone = Together([made.copy()], form)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = step(alone, alone, count_flops())
    except Exception as error:
        # Kernels raise errors of any type for what they do not support. Whatever eager PyTorch raises, there
        # is nothing to compare with; the report gives it as the reason why the subject was not run.
        return Built(failure=said(error))
    return Built(member=made, flops=done.flops)


def model_of(members: Iterable[Subject], form: Form) -> Together:
    """A new model of those subjects that the form applies to; it may have no member."""
    found = (built(member, form).member for member in members)
    return Together([member.copy() for member in found if member is not None], form)


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
    members = [member for member in members if built(member, form).member is not None]
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
            result = _compare(members, backend, result)
        except Exception as error:
            result = dataclasses.replace(result, difference=said(error))
    return dataclasses.replace(result, graphs=dynamo_counters["stats"]["unique_graphs"])


def said(error: BaseException) -> str:
    """An error in one line."""
    error = getattr(error, "inner_exception", None) or error
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _compare(members: Sequence[Subject], backend: Backend, result: Result) -> Result:
    model, form = model_of(members, result.form), result.form
    run = compiled(model, backend)
    step(run, model, count_flops())  # regions learn which of their outputs are differentiated
    for number, (trained, expected) in enumerate(_eager_steps(model_of(members, form), form)):
        if number % STEPS == 0:
            freeze(run, model, trained, backend)
        actual = step(run, model, count_flops())
        if difference(actual, expected):
            exact = _in_double_precision(members, form, number)
            if differs := difference(actual, expected, exact):
                where = f"{differs} ({_names(trained)} trained)"
                return dataclasses.replace(result, difference=where)
        last = number % STEPS == STEPS - 1
        if last and actual.flops != expected.flops and not result.flops:
            word = FEWER if actual.flops < expected.flops else "more"
            counted = f"{word} FLOPs: {actual.flops:,}, {expected.flops:,} in eager PyTorch"
            result = dataclasses.replace(result, flops=f"{counted} ({_names(trained)} trained)")
    return result


def _eager_steps(twin: nn.Module, form: Form) -> Iterator[tuple[frozenset[str], Step]]:
    """Train everything for one step, then yield each random set with each of its steps."""
    step(twin, twin, FlopCounterMode(display=False))
    for trained in random_sets(twin, form):
        freeze_eagerly(twin, trained)
        for _ in range(STEPS):
            yield trained, step(twin, twin, FlopCounterMode(display=False))


def _in_double_precision(members: Sequence[Subject], form: Form, number: int) -> Step | None:
    """One of the eager steps in double precision; None if eager PyTorch cannot run it."""
    try:
        steps = _eager_steps(model_of(members, form).double(), form)
        return next(itertools.islice(steps, number, None))[1]
    except Exception:  # kernels raise errors of any type for what they do not support
        return None


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
    """By name of a subject, whether its costs are `exact` or `zero` for random sets; if not, why."""
    members = [member for member in members if built(member, "plain").member is not None]
    if not members:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _predict_together(members)
    if found == EXACT:
        return {member.name: EXACT if built(member, "plain").flops else ZERO for member in members}
    if len(members) == 1:
        return {members[0].name: found}
    middle = len(members) // 2
    return predict(members[:middle]) | predict(members[middle:])


def _predict_together(members: Sequence[Subject]) -> str:
    model, twin = model_of(members, "plain"), model_of(members, "plain")
    try:
        costs = backward_costs(model, UNIT)
    except CaptureError as error:
        first_sentence = str(error).partition(". ")[0]
        return f"{REFUSED}: {first_sentence}"
    for trained in random_sets(twin, "plain"):
        freeze_eagerly(twin, trained)
        counted = step(twin, twin, FlopCounterMode(display=False)).flops
        if (expected := costs.step_flops(trained & costs.fqns)) != counted:
            ran = _compiled_flops(model, trained)
            word = FEWER if expected == ran < counted else "wrong"
            numbers = f"{expected:,} predicted, {ran:,} in compiled code, {counted:,} in eager PyTorch"
            return f"{word}: {numbers} ({_names(trained)} trained)"
    return EXACT


def _compiled_flops(model: nn.Module, trained: frozenset[str]) -> int:
    torch.compiler.reset()
    run = compiled(model, "specialized")
    freeze(run, model, trained, "specialized")
    step(run, model, count_flops())  # finds out which outputs are differentiated
    return step(run, model, count_flops()).flops
