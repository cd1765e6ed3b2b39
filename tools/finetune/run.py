"""A fine-tuning run from settings to summary, optionally followed by a full run to compare with."""

import contextlib
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import transformers

from gtcompile.distributed.ranks import Ranks
from gtcompile.errors import some
from gtcompile.state.restore import restored, temporarily_training
from gtcompile.state.trained_set import train_only
from gtcompile.tools.common.flop_meter import check_step_flops
from gtcompile.tools.common.step_memory import passes_memory
from gtcompile.tools.finetune.evaluation import generate_answers, score
from gtcompile.tools.finetune.loop import ALONE, Training, forward_and_backward
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.finetune.summary import StepComparison, Summary, summary_from
from gtcompile.tools.finetune.tensorboard_trace import open_trace
from gtcompile.tools.runs.preparation import Batch, Prepared, prepare
from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.settings import Settings

PAIRS_TIMED = 5
"""Timed steps of each kind in a comparison, after one that compiles."""


def finetune(
    settings: Settings,
    output: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    evaluate_before: bool = False,
    log_to: str | None = None,
    ranks: Ranks = ALONE,
) -> Summary:
    """Fine-tune, evaluate, and write everything to a folder.

    Compiled code and Dynamo's caches of earlier runs in this process are dropped.

    Args:
        settings: of the run.
        output: a folder that must be empty or not exist, unless a run is resumed.
        reporter: shows progress.
        resume: continue the run in `output` from its checkpoint, bit for bit as if it had not stopped.
        evaluate_before: also score the model before training; not repeated on resume.
        log_to: `tensorboard` for a trace in `output/tensorboard`.
        ranks: the processes that train together; the first one writes and evaluates.

    Raises:
        ValueError, GTCompileError: something is missing or does not fit; nothing is written then.
        StoppedEarlyError: Ctrl-C was pressed; `resume` continues.
    """
    with contextlib.closing(RunFolder(output, writes=ranks.rank == 0)) as folder:
        trace = open_trace(log_to if folder.writes else None, output)
        finished = ranks.from_first(lambda: _check_folder(folder, settings, resume=resume))
        if finished is not None:
            reporter.say(f"the run in {output} is finished")
            return finished
        prepared = prepare(settings, rank=ranks.rank)
        if resume:
            folder.check_same_examples(prepared.digest)
        _introduce(prepared, reporter)
        torch.compiler.reset()
        transformers.set_seed(settings.seed + ranks.rank)
        training = Training(prepared, folder, reporter, trace, ranks)
        before = None
        if resume:
            training.resume()
        elif evaluate_before:
            with restored(training.module):
                before = ranks.from_first(lambda: evaluate(prepared, reporter))
        try:
            training.run()
        finally:
            if trace is not None:
                trace.close()
        return ranks.from_first(lambda: _conclude(training, before))


def _conclude(training: Training, before: dict[str, float] | None) -> Summary:
    """Save the trained model, evaluate it, and finish the folder."""
    prepared, folder = training.prepared, training.folder
    folder.save_model(prepared.language)
    steps = None if prepared.settings.method == "full" else compare_steps(training)
    summary = _summarise(training, evaluate(prepared, training.reporter), before, steps)
    folder.write_summary(summary.as_dict())
    training.report.write(training.module, prepared.batch(prepared.epoch(0)[0]))
    return summary


def compare_with_full(
    settings: Settings,
    output: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    log_to: str | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Summary, Summary]:
    """Run as `finetune` does, then run full fine-tuning from the same start, into `output/full`.

    Returns:
        The two summaries, the full one last.
    """
    first = finetune(
        settings, output, reporter, resume=resume, evaluate_before=True, log_to=log_to, ranks=ranks
    )
    full = Settings(**{**settings.as_dict(), "method": "full"})
    folder = output / "full"
    again = ranks.from_first(lambda: resume and (folder / "run.json").is_file())
    return first, finetune(full, folder, reporter, resume=again, log_to=log_to, ranks=ranks)


def evaluate(prepared: Prepared, reporter: Reporter) -> dict[str, float]:
    """Generate answers for the evaluation split and score them, in percent."""
    with reporter.answering(len(prepared.prompts)) as on_progress:
        answers = generate_answers(
            prepared.language.model,
            prepared.language.tokenizer,
            prepared.prompts,
            max_new_tokens=prepared.max_new_tokens,
            num_beams=prepared.settings.num_beams,
            on_progress=on_progress,
        )
    references = [example.references for example in prepared.task.evaluation]
    return score(prepared.task.format.metric, answers, references)


def compare_steps(training: Training) -> StepComparison:
    """Count and measure a full step, and time it in turns with the last selection's; nothing is updated."""
    batch = training.prepared.batch(training.prepared.epoch(0)[0])
    last = training.selections[-1]
    patterns = {"full": None, "selection": last["trained"]}
    seconds: dict[str, list[float]] = {name: [] for name in patterns}
    with restored(training.module), temporarily_training(training.model, None):
        full_flops = check_step_flops(
            training.model, batch, last["full_flops"], recomputes=training.prepared.settings.recomputes
        )
        memory = passes_memory(training.model, batch, training.prepared.device)
        for _ in range(PAIRS_TIMED + 1):  # the first pair compiles
            for name, trained in patterns.items():
                train_only(training.model, trained)
                seconds[name].append(_seconds_of_step(training, batch))
    full, selected = (median(seconds[name][1:]) for name in patterns)
    return StepComparison(
        full_flops=full_flops,
        full_seconds=full,
        plan_seconds=selected,
        full_saved_bytes=memory.saved,
        full_peak_bytes=memory.peak,
    )


def _seconds_of_step(training: Training, batch: Batch) -> float:
    started = perf_counter()
    forward_and_backward(training.model, batch)
    return perf_counter() - started


def _check_folder(folder: RunFolder, settings: Settings, *, resume: bool) -> Summary | None:
    """Check the folder; return the summary if the run is already finished."""
    if not resume:
        folder.check_new()
        return None
    folder.check_same_run(settings)
    values = folder.read_summary()
    if values is not None:
        return summary_from(values)
    folder.hold()
    return None


def _introduce(prepared: Prepared, reporter: Reporter) -> None:
    reporter.say(f"model: {prepared.settings.model}, {prepared.language.model.num_parameters():,} parameters")
    if anew := prepared.language.random_weights:
        reporter.say(f"weights: the checkpoint lacks {some(anew)}, which start at random")
    reporter.say(f"tokenizer: {prepared.language.tokenizer_origin}")
    reporter.say(f"data: {prepared.task}")
    reporter.say(
        f"every batch is {prepared.collate.shape}, {prepared.real_tokens:.0%} of them not padding; "
        f"{prepared.steps_per_epoch} steps an epoch"
    )


def _summarise(
    training: Training,
    quality: dict[str, float],
    before: dict[str, float] | None,
    steps: StepComparison | None,
) -> Summary:
    prepared, settings = training.prepared, training.prepared.settings
    return Summary(
        title=settings.title,
        model=settings.model,
        tokenizer=prepared.language.tokenizer_origin,
        data=str(prepared.task),
        batch=prepared.collate.shape,
        real_tokens=prepared.real_tokens,
        compiler=settings.compiler,
        device=str(prepared.device),
        steps=training.steps,
        predicted_flops=training.predicted_flops,
        counted_flops=training.counted_flops,
        full_flops=training.selections[-1]["full_flops"] * training.steps * training.ranks.count,
        step_seconds=training.usual_step_seconds,
        training_seconds=training.seconds["training"],
        selecting_seconds=training.seconds["selecting"],
        quality=quality,
        quality_before=before,
        comparison=steps,
        note=prepared.task.format.note,
        processes=training.ranks.count,
    )
