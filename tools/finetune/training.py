"""Training with transformers' Trainer, whose every step is recorded."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from gtcompile.tools.data.answers import score
from gtcompile.tools.finetune.recorder import Recorder


class StoppedEarlyError(KeyboardInterrupt):
    """The run was stopped between two steps with Ctrl-C and can be resumed."""


class SeededGroups(LengthGroupedSampler):
    """Groups examples of similar length, in every epoch in another order, and after a resume in the same.

    Without a generator of its own the order would depend on all random numbers drawn before.

    Args:
        batch_size: examples that are grouped.
        lengths: of the examples.
        seed: with the epoch, decides the order.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Prepare the order of an epoch; the trainer calls it."""
        self.generator = torch.Generator().manual_seed(self._seed + epoch)


class RecordedTrainer(Trainer):
    """A trainer that tells the recorder of every forward and backward."""

    recorder: Recorder

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward, and wait for the device."""
        batch = dict(inputs)
        self.recorder.about_to_pass(batch)
        started = perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.recorder.passed(loss.item(), perf_counter() - started, batch)
        return loss

    def _get_train_sampler(self, *args: Any) -> Any:
        """Group examples by their length in tokens, in an order that follows from seed and epoch alone."""
        if not self.recorder.prepared.collate.grouped:
            return super()._get_train_sampler(*args)
        lengths = map(self.recorder.prepared.collate.length_of, self.recorder.prepared.examples)
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return SeededGroups(together, list(lengths), self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Keep the order of the prompts, by which the answers are scored."""
        return None if self.args.world_size > 1 else SequentialSampler(eval_dataset)


class RecordedSeq2SeqTrainer(RecordedTrainer, Seq2SeqTrainer):
    """The same for encoder-decoders, which can generate when they are evaluated during training."""


def make_trainer(recorder: Recorder, arguments: Seq2SeqTrainingArguments) -> Trainer:
    """The trainer of a run, whose steps the recorder writes."""
    prepared = recorder.prepared
    tokenizer, task = prepared.language.tokenizer, prepared.task
    arguments.generation_max_length = arguments.generation_max_length or prepared.max_new_tokens + 1

    def scores(prediction: Any) -> dict[str, float]:
        ids = prediction.predictions.clip(0, None)[: len(task.evaluation)]  # the last may be there twice
        answers = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return score(task.format.metric, answers, [example.references for example in task.evaluation])

    kind = RecordedSeq2SeqTrainer if prepared.language.encoder_decoder else RecordedTrainer
    examples: Any = prepared.examples  # a tuple is as good as a Dataset
    prompts: Any = prepared.prompts
    trainer = kind(
        model=prepared.language.model,
        args=arguments,
        data_collator=prepared.collate,
        train_dataset=examples,
        eval_dataset=prompts,
        compute_metrics=scores if arguments.predict_with_generate else None,
        callbacks=[recorder, recorder.adaptive],
    )
    trainer.remove_callback(PrinterCallback)
    recorder.trainer, trainer.recorder = trainer, recorder
    return trainer


def train(trainer: Trainer, recorder: Recorder, checkpoint: Path | None) -> None:
    """Train from a checkpoint, or from the beginning, to the end.

    Raises:
        StoppedEarlyError: Ctrl-C was pressed; the checkpoint is written.
        GTCompileError: the budget is too small, or a count contradicts the prediction.
        ValueError: the checkpoint is of another model.
    """
    steps = recorder.prepared.settings.epochs * recorder.prepared.steps_per_epoch
    steps = steps if trainer.args.max_steps < 0 else trainer.args.max_steps
    try:
        with recorder.reporter.bar("training", steps), _ctrl_c_noted(recorder):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (RuntimeError, ValueError) as error:
        if "loading state_dict" not in str(error) and "loaded state dict" not in str(error):
            raise
        raise ValueError(f"{checkpoint} is a checkpoint of another model: {error}") from error
    done = trainer.state.global_step
    if recorder.stopping and done < trainer.state.max_steps:
        raise StoppedEarlyError(f"stopped after step {done} of {trainer.state.max_steps}")


@contextlib.contextmanager
def _ctrl_c_noted(recorder: Recorder) -> Iterator[None]:
    """Within the block, Ctrl-C asks the recorder to stop after the step; a second one interrupts at once."""

    def note(number: int, frame: FrameType | None) -> None:
        if recorder.stop_requested:
            raise KeyboardInterrupt
        recorder.stop_requested = True

    if threading.current_thread() is not threading.main_thread():  # others cannot handle signals
        yield
        return
    former = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
