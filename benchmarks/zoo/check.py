"""Check the backend on one model: gradients, loss, trained set and FLOPs against eager freezing."""

import dataclasses
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.zoo.models import Architecture, read_architectures
from gtcompile import BackwardCosts, CaptureError, backward_costs, compile_blocks, train_only
from gtcompile.capture.model_io import loss_of
from gtcompile.compiler.blocks import find_blocks
from gtcompile.graph.flops import count_flops
from gtcompile.importance.gradient_stream import on_device
from gtcompile.testing import reference_gradients
from gtcompile.torch_internals import dynamo_counters

Scope = Literal["whole", "blocks"]
Compiler = Literal["eager", "inductor"]
SHARES = (0.15, 0.5, 0.9)
"""Sizes of the trained sets, as shares of the parameters that receive gradients."""
CPU = torch.device("cpu")
SEED = 0
"""Seed of every step, since some models route tokens at random even without dropout."""
TOLERANCE: Mapping[str, float] = {"eager": 1e-6, "inductor": 2e-4}
"""Greatest allowed difference of a gradient in float32, in units of the model's largest gradient."""
BFLOAT16_TOLERANCE = 0.03
"""The same in bfloat16, whose numbers have 8 bits."""
DOUBLE_TOLERANCE = 1e-8
"""Tolerance in double precision, where rounding almost vanishes and a wrong gradient stays wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How a model is compiled."""

    scope: Scope
    """Whether the model is one region, or each repeated block is."""
    compiler: Compiler

    def __str__(self) -> str:
        return f"{self.scope}-{self.compiler}"

    def compile(self, model: nn.Module) -> nn.Module:
        """The model, compiled so."""
        if self.scope == "blocks":
            return compile_blocks(model, compiler=self.compiler)
        compiled: Any = torch.compile(model, backend="gtcompile", options={"compiler": self.compiler})
        return compiled  # type: ignore[no-any-return]


MODES = {
    str(mode): mode
    for mode in (
        Mode(scope=scope, compiler=compiler)
        for compiler in ("eager", "inductor")
        for scope in ("whole", "blocks")
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The result of checking one model in one mode."""

    name: str
    family: str
    mode: str
    dtype: str = "float32"
    """Type of weights and activations."""
    regions: int = 0
    """Graphs that Dynamo captured."""
    parameters: int = 0
    """Parameters that receive a gradient."""
    sets: int = 0
    """Trained sets whose gradients were compared."""
    gradient_difference: float = 0.0
    """Greatest absolute difference of a gradient, over the model's largest gradient."""
    double_difference: float | None = None
    """The difference in double precision; None if single precision was enough."""
    loss_difference: float = 0.0
    """Greatest absolute difference of a loss."""
    flops_difference: int | None = None
    """Greatest difference between predicted and counted FLOPs of a step; None when there is no prediction."""
    seconds: float = 0.0
    failure: str = ""
    """The error, or the reason why there is no prediction; empty if everything is right."""

    @property
    def right(self) -> bool:
        """Whether gradients and trained sets are right, in double precision where rounding decides."""
        rounded = self.dtype == "bfloat16"
        tolerance = BFLOAT16_TOLERANCE if rounded else TOLERANCE[MODES[self.mode].compiler]
        settled = self.double_difference is not None and self.double_difference <= DOUBLE_TOLERANCE
        return self.sets == len(SHARES) and (self.gradient_difference <= tolerance or settled)

    @property
    def skipped(self) -> bool:
        """Whether the mode does not apply: the model has no repeated blocks."""
        return self.failure == NO_BLOCKS


NO_BLOCKS = "no repeated blocks"


def check(
    architecture: Architecture,
    mode: Mode,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Checked:
    """Build a model, compile it, and compare three random trained sets with eager freezing.

    Errors do not raise; they are part of the result.
    """
    start = time.perf_counter()
    result = Checked(
        name=architecture.name,
        family=architecture.family,
        mode=str(mode),
        dtype=str(dtype).removeprefix("torch."),
    )
    try:
        model, batch = architecture.build(dtype), architecture.batch(dtype)
        result = _check(model.to(device), on_device(batch, device), mode, result)  # type: ignore[arg-type]
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        result = dataclasses.replace(result, failure=f"{type(error).__name__}: {lines[0][:200]}")
    return dataclasses.replace(result, seconds=round(time.perf_counter() - start, 1))


def _check(model: nn.Module, batch: Mapping[str, Any], mode: Mode, result: Checked) -> Checked:
    if mode.scope == "blocks" and not list(find_blocks(model)):
        return dataclasses.replace(result, failure=NO_BLOCKS)
    loss_of(model(**batch)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    model.zero_grad()
    run = mode.compile(model)
    torch.manual_seed(SEED)
    costs, reason = _costs(run, batch)
    captured = dynamo_counters["stats"]["unique_graphs"]
    worst, loss_difference, flops = 0.0, 0.0, 0
    for trained in random_sets(sorted(gradients)):
        train_only(run, trained)
        torch.manual_seed(SEED)
        expected = reference_gradients(run, batch)
        torch.manual_seed(SEED)
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            eager_loss = loss_of(model(**batch))
        loss = _step(run, batch)
        loss_difference = max(loss_difference, float((loss - eager_loss).abs()))
        worst = max(worst, gradient_difference(model, expected) / largest)
        if costs is not None:
            for _ in range(2):  # code after a graph break may be captured again in the first pass
                model.zero_grad()
                with count_flops() as counter:
                    _step(run, batch)
            flops = max(flops, abs(counter.get_total_flops() - costs.step_flops(trained)), key=abs)
        model.zero_grad()
    return dataclasses.replace(
        result,
        regions=dynamo_counters["stats"]["unique_graphs"] - captured,
        parameters=len(gradients),
        sets=len(SHARES),
        gradient_difference=worst,
        loss_difference=loss_difference,
        flops_difference=None if costs is None else flops,
        failure=reason,
    )


def settle(architecture: Architecture, result: Checked, device: torch.device = CPU) -> Checked:
    """Check a result again in double precision if its gradients differ by more than the tolerance."""
    if result.right or result.sets < len(SHARES):
        return result
    torch.compiler.reset()
    double = check(architecture, MODES[result.mode], torch.float64, device)
    if double.sets < len(SHARES):
        return result
    return dataclasses.replace(result, double_difference=double.gradient_difference)


def _costs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[BackwardCosts | None, str]:
    """Costs, or why there are none."""
    try:
        return backward_costs(model, batch), ""
    except CaptureError as error:
        return None, f"not costed: {str(error).splitlines()[0][:160]}"


def _step(run: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    torch.manual_seed(SEED)
    loss = loss_of(run(**batch))
    loss.backward()
    return loss.detach()


def random_sets(names: list[str]) -> list[frozenset[str]]:
    """One trained set for each share, the same every time."""
    draw = random.Random(0)
    return [frozenset(draw.sample(names, max(1, round(share * len(names))))) for share in SHARES]


def gradient_difference(model: nn.Module, expected: Mapping[str, torch.Tensor]) -> float:
    """Greatest absolute difference between a model's gradients and the expected ones.

    Raises:
        AssertionError: when other parameters have a gradient than expected.
    """
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if actual.keys() != expected.keys():
        unexpected = sorted(actual.keys() ^ expected.keys())
        raise AssertionError(f"gradients of the wrong parameters, first of them {unexpected[:3]}")
    return max((float((actual[n] - expected[n]).abs().max()) for n in expected), default=0.0)


def plain_failure(architecture: Architecture) -> str:
    """The error of a step of `torch.compile(model, backend="aot_eager")`; empty if it is right."""
    torch.compiler.reset()
    try:
        model, batch = architecture.build(), architecture.batch()
        torch.manual_seed(SEED)
        expected = reference_gradients(model, batch)
        _step(torch.compile(model, backend="aot_eager"), batch)  # type: ignore[arg-type]
        worst = gradient_difference(model, expected) / max(float(g.abs().max()) for g in expected.values())
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:160]}"
    return f"gradients differ by {worst:.1e} too" if worst > TOLERANCE["eager"] else ""


def check_named(path: Path, name: str, mode: str) -> Checked:
    """Check one model of a file; if it is not right, add the result of plain `aot_eager`."""
    torch.set_num_threads(1)
    architecture = read_architectures(path)[name]
    result = settle(architecture, check(architecture, MODES[mode]))
    if result.right or result.skipped:
        return result
    plain = plain_failure(architecture) or "works"
    return dataclasses.replace(result, failure=f"{result.failure} [plain aot_eager: {plain}]")
