"""Steps on two GPUs, replicated and sharded, against eager PyTorch wrapped in the same way."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.candidates import EAGER, OURS, PLAIN
from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import SHORT, Setting
from benchmarks.gpu.sheet import Sheet
from benchmarks.gpu.steps import Measured, find, queue_steps, ratio
from benchmarks.processes import Job, Result, run_jobs
from benchmarks.zoo.check import BFLOAT16_TOLERANCE, TOLERANCE
from gtcompile import compile_blocks, train_only
from gtcompile.compiler.blocks import find_blocks
from gtcompile.distributed.fsdp import local
from gtcompile.tools.bench.baselines import Candidate, Trained, freeze
from gtcompile.tools.bench.measurement import spread
from gtcompile.tools.bench.subject import ModelSubject
from gtcompile.tools.common.step_memory import peak_bytes
from gtcompile.training.ddp import prepare

RANKS = 2
REPLICATED, SHARDED, MIXED = "DDP", "FSDP2", "FSDP2, mixed precision"
BUDGET = 0.5
TRIALS = ((OURS, 1.0), (EAGER, 1.0), (PLAIN, 1.0), (OURS, BUDGET), (EAGER, BUDGET))
"""Ways and budgets, in the order of a round; eager PyTorch has the set that gtcompile trains."""
ROUNDS = (3, 7)
"""Fewest and most rounds."""
LIMIT_S = 3600.0
"""Seconds for both ranks; the limit of the stage ends them before that."""
Wrap = Callable[[nn.Module], nn.Module]


def units(setting: Setting) -> list[str]:
    """The ways to share the work."""
    return [REPLICATED, SHARDED, MIXED]


def measure(setting: Setting, unit: str, deadline: float) -> Iterator[Measured]:
    """Start one process per GPU; yields everything so far after each trial, and after each round."""
    if lacking := _lacking(setting):
        yield {"skipped": lacking, "trials": []}
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "ranks")
        jobs = [
            Job(f"rank {rank}", train_on_rank, (setting, unit, rank, meeting, deadline))
            for rank in range(RANKS)
        ]
        for message in run_jobs(jobs, limit_s=LIMIT_S, workers=RANKS):
            if isinstance(message, Result):
                yield message.value
            elif message.failure:  # the other rank would wait for this one
                raise RuntimeError(f"{message.job}: {message.failure}")


def _lacking(setting: Setting) -> str:
    """Why two ranks cannot be started; empty if they can."""
    if not setting.device.startswith("cuda"):
        return "" if dist.is_gloo_available() else "this torch has no gloo, by which two ranks on a CPU talk"
    if setting.device != "cuda":
        return f"{RANKS} GPUs are needed, and --device {setting.device} names one"
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    count = torch.cuda.device_count()
    return "" if count >= RANKS else f"{RANKS} GPUs are needed, and {count} can be seen"


def train_on_rank(
    setting: Setting, unit: str, rank: int, meeting: str, deadline: float, _limit: float
) -> Iterator[Measured]:
    """Measure on one rank; the first one yields the results.

    Args:
        setting: of the run.
        unit: how the work is shared.
        rank: of this process.
        meeting: file by which the ranks find each other.
        deadline: by `time.monotonic()`; at least the fewest rounds are measured.
    """
    setting.log_output()
    setting = _join(setting, rank, meeting)
    for found in _measure(setting, unit, deadline):
        if rank == 0:
            yield found
    dist.destroy_process_group()


def _join(setting: Setting, rank: int, meeting: str) -> Setting:
    """Join the other rank; returns the setting with the device of this one."""
    store = dist.FileStore(meeting, RANKS)  # type: ignore[attr-defined] # missing in the stubs
    places: Mapping[str, Any] = {"store": store, "rank": rank, "world_size": RANKS}
    if setting.device == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo", **places)
        return setting
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **places)
    return dataclasses.replace(setting, device=str(device))


def _measure(setting: Setting, unit: str, deadline: float) -> Iterator[Measured]:
    subject, device = _subject(setting, unit), torch.device(setting.device)
    runners = _runners(setting, unit, subject)
    rounded = unit == MIXED or setting.dtype == torch.bfloat16
    compared = {
        "gradient_difference": _gradient_difference(runners, device),
        "tolerance": BFLOAT16_TOLERANCE if rounded else TOLERANCE["inductor"],
    }
    tokens = RANKS * subject.example["input_ids"].numel()
    found: Measured = {"skipped": "", "tokens": tokens, **compared, "trials": []}
    yield found
    for (way, budget), runner in runners.items():
        _rest(runners, runner)
        runner.start()
        row = {"candidate": way, "budget": budget, "host_s": [], "step_s": []}
        found["trials"].append(row | {"peak_bytes": peak_bytes(runner.candidate.step, device)})
        yield found
    for done in range(ROUNDS[1]):
        started = time.monotonic()
        for row, runner in zip(found["trials"], runners.values(), strict=True):
            _rest(runners, runner)
            runner.start()
            dist.barrier()
            host, total = queue_steps(runner.candidate.step, device)
            row["host_s"].append(host)
            row["step_s"].append(total)
        yield found
        late = done + 1 >= ROUNDS[0] and 2 * time.monotonic() - started > deadline
        if _greatest(float(late), device):  # ranks stop together
            return


def _subject(setting: Setting, unit: str) -> ModelSubject:
    """The workload; with mixed precision its weights are in float32. Each rank has a batch of its own."""
    workload = setting.workload(SHORT)
    if unit == MIXED:
        workload = dataclasses.replace(workload, dtype=torch.float32)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(workload.vocabulary, (workload.rows, workload.length), generator=generator)
    batch = {"input_ids": ids.to(workload.device), "labels": ids.to(workload.device)}
    return ModelSubject(name=SHORT, original=workload.model(), example=batch, shape=SHORT)


@dataclass(frozen=True, slots=True)
class _Runner:
    """One trial: a candidate and the set that it trains."""

    candidate: Candidate
    trained: Trained | None

    def start(self) -> None:
        """Train the set for a step, so that the next step is an ordinary one."""
        self.candidate.switch_and_step(self.trained)


def _runners(setting: Setting, unit: str, subject: ModelSubject) -> dict[tuple[str, float], _Runner]:
    """The trials; gtcompile changes the set of one model, and eager PyTorch needs a model for each set."""
    compilers = ("eager", "aot_eager") if setting.tiny else ("inductor", "inductor")  # enough for a test
    sets = {1.0: None, BUDGET: setting.selections(SHORT)[BUDGET].trained}
    wrap = _wrapper(setting, unit, changing=True)
    ours = Candidate(subject, functools.partial(_ours, wrap=wrap, compiler=compilers[0]), train_only)
    wrap, runners = _wrapper(setting, unit, changing=False), {}
    for way, budget in TRIALS:
        trained = sets[budget]
        if way == OURS:
            candidate = ours
        else:
            backend = compilers[1] if way == PLAIN else None
            make = functools.partial(_fixed, wrap=wrap, trained=trained, backend=backend)
            candidate = Candidate(subject, make, _leave)
        runners[way, budget] = _Runner(candidate, trained)
    return runners


def _wrapper(setting: Setting, unit: str, *, changing: bool) -> Wrap:
    """How a model is wrapped whose trained set changes, or does not."""
    if unit == REPLICATED:
        return functools.partial(
            DistributedDataParallel, find_unused_parameters=changing, gradient_as_bucket_view=True
        )
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if unit == MIXED else MixedPrecisionPolicy()
    mesh = init_device_mesh(torch.device(setting.device).type, (RANKS,))
    return functools.partial(_shard, shard=functools.partial(fully_shard, mesh=mesh, mp_policy=policy))


def _shard(model: nn.Module, shard: Callable[[nn.Module], object]) -> nn.Module:
    """Shard every block, then the rest."""
    for name in list(find_blocks(model)):
        shard(model.get_submodule(name))
    shard(model)
    return model


def _ours(model: nn.Module, wrap: Wrap, compiler: str) -> nn.Module:
    wrapped = wrap(compile_blocks(model, compiler=compiler))
    if isinstance(wrapped, DistributedDataParallel):
        prepare(wrapped)
    return wrapped


def _fixed(model: nn.Module, wrap: Wrap, trained: Trained | None, backend: str | None) -> nn.Module:
    """A model whose set never changes: it is frozen before it is wrapped, as both wrappers want it."""
    freeze(model, trained)
    for name in find_blocks(model) if backend else ():
        model.get_submodule(name).compile(backend=backend)
    return wrap(model)


def _leave(model: nn.Module, trained: Trained | None) -> None:
    """Leave the set as it is."""


def _gradient_difference(runners: Mapping[tuple[str, float], _Runner], device: torch.device) -> float:
    """Compare the gradients of the chosen set with eager PyTorch's, on all ranks, before any step.

    Returns:
        The greatest absolute difference on any rank, over the largest gradient.

    Raises:
        AssertionError: other parameters have a gradient.
    """
    ours, eager = runners[OURS, BUDGET], runners[EAGER, BUDGET]
    gradients = []
    for runner in (eager, ours):
        runner.candidate.switch(runner.trained)
        runner.candidate.loss().backward()
        named = runner.candidate.model.named_parameters()
        gradients.append({name: local(p.grad) for name, p in named if p.grad is not None})
    expected, actual = gradients
    if actual.keys() != expected.keys() or expected.keys() != runner.trained:
        wrong = sorted(actual.keys() ^ (runner.trained or set()))
        raise AssertionError(f"gradients of the wrong parameters, first of them {wrong[:3]}")
    # unlike max(), torch's keeps a NaN
    largest = float(torch.stack([g.abs().max() for g in expected.values() if g.numel()]).max())
    differences = [(actual[name] - g).abs().max() for name, g in expected.items() if g.numel()]
    apart = float(torch.stack(differences).max())
    for runner in (eager, ours):
        runner.candidate.optimizer.zero_grad()
    return _greatest(apart, device) / _greatest(largest, device)


def _rest(runners: Mapping[tuple[str, float], _Runner], but: _Runner) -> None:
    """Let the other candidates drop their optimizer state, since a user would have one model in memory."""
    for runner in runners.values():
        if runner.candidate is not but.candidate:
            runner.candidate.forget_moments()


def _greatest(value: float, device: torch.device) -> float:
    """The greatest value of all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


def sheet(saved: Saved) -> Sheet:
    """One row per wrapper, way and budget."""
    columns = ("wrapped in", "trained by", "budget", "ms", "to own full step", "to eager, same set")
    rows, remarks = [], []
    for unit, found in saved.results.items():
        if found["skipped"]:
            remarks.append(f"{unit} was not measured: {found['skipped']}")
            continue
        rows += [_cells(unit, found, row) for row in found["trials"] if row["step_s"]]
        apart, limit = found["gradient_difference"], found["tolerance"]
        word = "right" if apart <= limit else "WRONG"
        remarks.append(f"{unit}: gradients over the largest {apart:.1e}: {word} (at most {limit:.1e})")
    return Sheet(
        title=f"Two GPUs ({SHORT} on each)",
        columns=(*columns, "host ms", "tokens/s, both", "peak GB of one"),
        rows=rows,
        verdicts=remarks,
    )


def _cells(unit: str, found: Measured, row: Measured) -> tuple[str, ...]:
    way, budget, times = row["candidate"], row["budget"], spread(row["step_s"])
    return (
        unit,
        way,
        f"{budget:g}",
        f"{times / 1e-3}",
        str(ratio(row, find(found, way, 1.0)) or ""),
        str(ratio(row, find(found, EAGER, budget)) or ""),
        f"{spread(row['host_s']).median * 1e3:.1f}",
        f"{found['tokens'] / times.median:.0f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
    )
