"""Whether Inductor generates code for a run: only if the run is long enough to win back what that takes."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from gtcompile.capture.batch_tree import split_batch
from gtcompile.capture.model_io import tensors_of
from gtcompile.compiler.blocks import compile_blocks, find_blocks
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import GTCompileError
from gtcompile.state.restore import restored
from gtcompile.tools.finetune.step_comparison import FULL_DOES_NOT_FIT, seconds_of_step
from gtcompile.tools.runs.preparation import Prepared, default_compiler
from gtcompile.tools.runs.settings import Compiler

TRIED_FROM = 300.0
"""Seconds that the steps of a run must take before code is generated for one block, to try it. That usually
takes about half a minute, so it delays no run by more than a tenth or so."""
PAIRS_TIMED = 5
"""Timed runs of the block of each kind, after one that generates code."""
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """One block of a model, timed eagerly and as Inductor's code, forward and backward."""

    count: int
    """Blocks of the model."""
    generating: float
    """Seconds until the code was there."""
    eager: float
    """Median seconds of eager PyTorch."""
    code: float
    """Median seconds of the code."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The compiler of a run, and why."""

    compiler: Compiler
    """One of the two."""
    reason: str
    """A sentence with the numbers that decided."""


def choose_compiler(
    passes: int, share: float, step_seconds: Callable[[], float], block_times: Callable[[], BlockTimes]
) -> Choice:
    """Choose the compiler of a run by what is measured, and measure no more than that needs.

    Args:
        passes: forward and backward passes of the run, in one process.
        share: what a pass costs of one that trains everything.
        step_seconds: times a forward and backward of eager PyTorch that trains everything. The first time,
            it may take longer than later.
        block_times: tries code for one block.

    The choice is "eager" if no code can be generated, as on a machine without a compiler of C++.
    """
    for said in ("at most ", ""):
        seconds = share * step_seconds()
        of_the_run = f"{passes} passes of {said}{seconds:.2g} s"
        if passes * seconds < TRIED_FROM:
            return Choice(
                "eager",
                f"{of_the_run} take {passes * seconds:.0f} s: generating code takes half a minute or so, and "
                f"is tried in runs of {TRIED_FROM:.0f} s or more, so code is not generated",
            )
    try:
        block = block_times()
    except (RuntimeError, GTCompileError) as error:  # those of Dynamo and Inductor are RuntimeErrors
        line = str(error).strip().partition("\n")[0]
        return Choice("eager", f"code could not be generated for a block ({type(error).__name__}: {line})")
    saved = passes * share * block.count * (block.eager - block.code)
    pays = saved > block.generating
    would = f"would save about {saved:.0f} s" if saved > 0 else "would save nothing"
    return Choice(
        "inductor" if pays else "eager",
        f"{of_the_run}: generating code takes about {block.generating:.0f} s and {would}, by a block that "
        f"was tried, so code is {'' if pays else 'not '}generated",
    )


def with_chosen_compiler(prepared: Prepared, say: Callable[[str], None], ranks: Ranks) -> Prepared:
    """Choose the compiler of a run, unless its settings name one, and say why."""
    settings = prepared.settings
    if settings.compiler != "auto":
        return prepared
    say("compiler: timing a step of eager PyTorch, and a block's code if the run is long, to choose")
    choice = ranks.from_first(lambda: _choice(prepared))
    say(f"compiler: {choice.compiler}. {choice.reason[0].upper()}{choice.reason[1:]}")
    return replace(prepared, settings=replace(settings, compiler=choice.compiler))


def _choice(prepared: Prepared) -> Choice:
    settings, timer = prepared.settings, Timer(prepared)
    if not timer.blocks:
        reason = f"the model has no repeated blocks to try, so it is the one for {prepared.device.type}"
        return Choice(default_compiler(), reason)
    share = settings.budget if settings.policy != "full" and settings.budget_of == "step" else 1.0
    try:
        return choose_compiler(prepared.passes, share, timer.step_seconds, timer.block_times)
    except torch.OutOfMemoryError:
        return Choice(
            default_compiler(),
            f"{FULL_DOES_NOT_FIT}, so nothing was timed: this is the one for {prepared.device.type}",
        )


class Timer:
    """Times steps of a model, and one of its blocks; the model is afterwards as it was.

    Args:
        prepared: model and examples.
        clock: tells the time in seconds.
    """

    def __init__(self, prepared: Prepared, clock: Clock = perf_counter) -> None:
        self._model: nn.Module = prepared.language.model
        self._prepared, self._clock = prepared, clock
        self.blocks = list(find_blocks(self._model))
        """Names of the repeated blocks."""
        self._inputs: tuple[Any, dict[str, Any]] = (), {}
        """What the last block got. Its input requires a gradient like that of most blocks, whereas nothing
        below the first one may be trained."""

    def step_seconds(self) -> float:
        """Time a forward and backward of eager PyTorch."""
        block = self._model.get_submodule(self.blocks[-1])
        note = block.register_forward_pre_hook(self._note, with_kwargs=True)
        try:
            with restored(self._model), self._autocast():
                return seconds_of_step(self._model, self._prepared.sample(), self._clock)
        finally:
            note.remove()

    def block_times(self) -> BlockTimes:
        """Generate code for a copy of the last block, and time it in turns with eager PyTorch."""
        holder = nn.ModuleDict({"block": copy.deepcopy(self._model.get_submodule(self.blocks[-1]))})
        frugality = self._prepared.settings.activation_memory_budget
        compile_blocks(holder, blocks=["block"], compiler="inductor", activation_memory_budget=frugality)
        run = functools.partial(self._block_seconds, holder["block"])
        plainly: Callable[[], float] = torch.compiler.disable(run)
        try:
            with restored(holder), self._autocast():
                first = run()
                plainly()
                pairs = [(plainly(), run()) for _ in range(PAIRS_TIMED)]
        finally:
            torch.compiler.reset()
        eager, code = (median(times) for times in zip(*pairs, strict=True))
        return BlockTimes(count=len(self.blocks), generating=first - code, eager=eager, code=code)

    def _note(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inputs = args, kwargs

    def _block_seconds(self, block: nn.Module) -> float:
        tensors, rebuild = split_batch(self._inputs)
        args, kwargs = rebuild(
            {name: each.detach().requires_grad_(each.requires_grad) for name, each in tensors.items()}
        )
        began = self._clock()
        outputs = [each for each in tensors_of(block(*args, **kwargs)) if each.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
        if self._prepared.device.type == "cuda":
            torch.cuda.synchronize(self._prepared.device)
        return self._clock() - began

    def _autocast(self) -> torch.autocast:
        args = self._prepared.settings.args
        dtype = torch.float16 if args.get("fp16") else torch.bfloat16
        enabled = bool(args.get("fp16") or args.get("bf16"))
        return torch.autocast(self._prepared.device.type, dtype, enabled=enabled)
