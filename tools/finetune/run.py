"""A fine-tuning run from settings to summary, optionally followed by a full run to compare with."""

import contextlib
import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gtcompile.costs.budgets import WHOLE
from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import GTCompileError, some
from gtcompile.graph.module_paths import block_of_parameter
from gtcompile.state.restore import restored
from gtcompile.tools.common.energy import check_energy_known
from gtcompile.tools.data.answers import generate_answers, score
from gtcompile.tools.finetune.compiler_choice import with_chosen_compiler
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.finetune.recorder import PlannedError, Recorder
from gtcompile.tools.finetune.summary import Summary, summarise, summary_from
from gtcompile.tools.finetune.trainer_options import training_arguments
from gtcompile.tools.finetune.training import make_trainer, train
from gtcompile.tools.inspect import inspect_run, write_report
from gtcompile.tools.models.adapters import adapted_layers
from gtcompile.tools.runs.preparation import Prepared, prepare
from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.settings import LORA_LR, LORA_RATES, Settings

ALONE = Ranks(None)
REPORT = "report.html"
"""Name of the report in the folder of a finished run."""


def finetune(
    settings: Settings,
    output: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    evaluate_before: bool = False,
    ranks: Ranks = ALONE,
) -> Summary:
    """Fine-tune, evaluate, and write everything to a folder.

    Compiled code and Dynamo's caches of earlier runs in this process are dropped.

    Args:
        settings: of the run.
        output: a folder that must be empty or not exist, unless a run is resumed.
        reporter: shows progress.
        resume: continue the run in `output` from its last checkpoint, bit for bit as if it had not stopped;
            from its beginning if there is none yet. With more epochs, a finished run goes on.
        evaluate_before: also score the model before training; not repeated on resume.
        ranks: the processes that train together; the first one writes and evaluates.

    Raises:
        ValueError, GTCompileError: something is missing or does not fit; nothing is written then.
        StoppedEarlyError: Ctrl-C was pressed; `resume` continues.
    """
    with contextlib.closing(RunFolder(output, writes=ranks.rank == 0)) as folder, _left_if_filled(output):
        finished = ranks.from_first(lambda: _check_folder(folder, settings, resume=resume))
        if finished is not None:
            reporter.say(f"the run in {output} is finished; more --epochs extend it")
            return finished
        arguments = training_arguments(settings, output)
        if resume and settings.compiler == "auto":
            settings = dataclasses.replace(settings, compiler=folder.read_settings()["compiler"])
        prepared = _prepare(settings, reporter, ranks)
        before = checkpoint = None
        if resume:
            folder.check_same_run(settings, prepared.digest)
            ranks.from_first(lambda: folder.extend(settings.epochs))
            checkpoint = folder.last_checkpoint()
            reporter.say(f"continuing from {checkpoint or 'the beginning: there is no checkpoint yet'}")
        elif evaluate_before:
            with restored(prepared.language.model):
                before = ranks.from_first(lambda: evaluate(prepared, reporter))
        recorder = Recorder(prepared, folder, reporter, ranks, resumed=resume)
        train(make_trainer(recorder, arguments), recorder, checkpoint)
        return ranks.from_first(lambda: _conclude(recorder, before))


def plan(settings: Settings, reporter: Reporter, *, ranks: Ranks = ALONE) -> None:
    """Make and show the first selection of a run, with what its steps cost and how long they take.

    Raises:
        ValueError, GTCompileError: something is missing or does not fit.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(settings, Path(scratch))
        prepared = _prepare(settings, reporter, ranks)
        folder = RunFolder(Path(scratch), writes=False)
        recorder = Recorder(prepared, folder, reporter, ranks, plan_only=True)
        trainer = make_trainer(recorder, arguments)
        with contextlib.suppress(PlannedError):
            train(trainer, recorder, None)
    for line in _plan_in_words(recorder, trainer.state.max_steps):
        reporter.say(line)


def compare_with_full(
    settings: Settings, output: Path, reporter: Reporter, *, resume: bool = False, ranks: Ranks = ALONE
) -> tuple[Summary, Summary]:
    """Run as `finetune` does, then run full fine-tuning from the same start, into `output/full`.

    If the run has adapters, full fine-tuning has none, and a smaller learning rate.

    Returns:
        The two summaries, the full one last.
    """
    first = finetune(settings, output, reporter, resume=resume, evaluate_before=True, ranks=ranks)
    full = dataclasses.replace(full_run_beside(settings), compiler=first.compiler)
    if full.lr != settings.lr:
        reporter.say(
            f"full fine-tuning, without adapters, has a learning rate of {full.lr:g}: adapters get "
            f"{LORA_RATES:g} times as much"
        )
    folder = output / "full"
    again = ranks.from_first(lambda: resume and (folder / "run.json").is_file())
    return first, finetune(full, folder, reporter, resume=again, ranks=ranks)


def full_run_beside(settings: Settings) -> Settings:
    """The settings of the full fine-tuning that a run is compared with."""
    plain = dataclasses.replace(
        settings,
        policy="full",
        prefix_cache=None,
        labelled_logits=False,
        budget_seconds=None,
        budget_memory=None,
    )
    if settings.lora is None:
        return plain
    none: dict[str, Any] = dict.fromkeys(("lora", "lora_alpha", "target_modules"))
    return dataclasses.replace(plain, budget_of="step", lr=settings.lr / LORA_RATES, **none)


def evaluate(prepared: Prepared, reporter: Reporter) -> dict[str, float]:
    """Generate answers for the evaluation split and score them, in percent."""
    reporter.say(f"answering {len(prepared.prompts)} prompts")
    with reporter.bar("answering", len(prepared.prompts)):
        answers = generate_answers(
            prepared.language.model,
            prepared.language.tokenizer,
            prepared.prompts,
            max_new_tokens=prepared.max_new_tokens,
            num_beams=prepared.settings.num_beams,
            on_progress=reporter.advance,
        )
    references = [example.references for example in prepared.task.evaluation]
    return score(prepared.task.format.metric, answers, references)


def _conclude(recorder: Recorder, before: dict[str, float] | None) -> Summary:
    """Save the trained model, evaluate it, and finish the folder."""
    prepared, folder = recorder.prepared, recorder.folder
    folder.save_model(prepared.language)
    summary = summarise(
        prepared,
        folder.metrics(),
        recorder.selections,
        quality=evaluate(prepared, recorder.reporter),
        quality_before=before,
        comparison=recorder.comparison,
    )
    folder.write_summary(summary.as_dict())
    try:
        write_report(inspect_run(folder.path), folder.path / REPORT)
    except (OSError, ValueError, GTCompileError) as error:
        recorder.reporter.say(
            f"{REPORT} could not be written: {error}; later: gtcompile inspect {folder.path} --html FILE"
        )
    return summary


def _check_folder(folder: RunFolder, settings: Settings, *, resume: bool) -> Summary | None:
    """Check the folder; return the summary if the run is already finished."""
    if not resume:
        folder.check_new()
        return None
    folder.check_same_run(settings)
    if settings.epochs == folder.read_settings()["epochs"] and (values := folder.read_summary()):
        return summary_from(values)
    folder.hold()
    return None


@contextlib.contextmanager
def _left_if_filled(output: Path) -> Iterator[None]:
    """Remove the folder that `Trainer` makes, if it did not exist before and nothing was written into it."""
    existed = output.exists()
    try:
        yield
    finally:
        if not existed:
            with contextlib.suppress(OSError):
                output.rmdir()


def _prepare(settings: Settings, reporter: Reporter, ranks: Ranks) -> Prepared:
    """Load model and data, and say what was loaded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_energy_known(settings.grid_intensity, settings.watts, device)
    prepared = prepare(settings)
    torch.compiler.reset()
    reporter.say(f"model: {settings.model}, {prepared.language.model.num_parameters():,} parameters")
    if settings.lora is not None:
        reporter.say(_adapters_in_words(prepared))
    if anew := prepared.language.random_weights:
        reporter.say(f"weights: the checkpoint lacks {some(anew)}, which start at random")
    reporter.say(f"tokenizer: {prepared.language.tokenizer_origin}")
    reporter.say(f"data: {prepared.task}")
    if copies := prepared.task.duplicates:
        reporter.say(f"data: {copies} of the evaluation's texts are also trained on, in other records")
    padding = "" if settings.grouped else f", {prepared.real_tokens:.0%} of them not padding"
    reporter.say(
        f"every batch is {prepared.collate.shape}{padding}; {prepared.steps_per_epoch} steps an epoch"
    )
    return with_chosen_compiler(prepared, reporter.say, ranks)


def _adapters_in_words(prepared: Prepared) -> str:
    settings, model = prepared.settings, prepared.language.model
    numel = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rate = ", the default for LoRA" if settings.lr == LORA_LR else ""
    budget = "" if settings.policy == "full" else f"; the budget is a share of {WHOLE[settings.budget_of]}"
    return (
        f"LoRA: adapters of rank {settings.lora} in {adapted_layers(model)} layers, {numel:,} of these "
        f"parameters; learning rate {settings.lr:g}{rate}{budget}"
    )


def _plan_in_words(recorder: Recorder, steps: int) -> Iterator[str]:
    selection, full = recorder.selections[0], recorder.comparison
    blocks = Counter(map(block_of_parameter, selection["trained"]))
    yield "trained first: " + ", ".join(f"{count} of {block}" for block, count in blocks.items())
    own = None if full is None else full.plan_seconds
    yield f"a step: {_in_words(selection['step_flops'], selection['saved_bytes'], own)}"
    if selection["cached_step_flops"] < selection["step_flops"]:
        yield f"a step that starts from the prefix cache: {selection['cached_step_flops']:.4e} FLOPs"
    settings = recorder.prepared.settings
    if settings.lora is not None:
        yield f"a step that trains all adapters: {selection['full_flops']:.4e} FLOPs"
    if full is not None:
        plain = "a full step of plain PyTorch"
        if settings.lora is not None:
            plain = "a step of full fine-tuning in plain PyTorch, without adapters"
        yield f"{plain}: {_in_words(full.full_flops, full.full_saved_bytes, full.full_seconds)}"
    batches = steps * int(settings.args.get("gradient_accumulation_steps", 1))
    epochs = steps / recorder.prepared.steps_per_epoch
    selections = 1 if settings.selects_once else math.ceil(epochs / settings.reselect_every)
    which = "the only selection" if selections == 1 else f"{selections} selections, the first of which"
    time = f", about {batches * own:.0f} s" if own is not None else ""
    yield f"the run: {steps} steps{time}, and {which} took {selection['seconds']:.1f} s"
    yield "nothing was trained or written"


def _in_words(flops: int, saved_bytes: int, seconds: float | None) -> str:
    time = f", {seconds:.4f} s" if seconds is not None else ""
    return f"{flops:.4e} FLOPs, {saved_bytes / 2**20:,.1f} MiB saved for backward{time}"
