"""The progress of a run: live on a terminal, in plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gtcompile.tools.common.terminal import say

if TYPE_CHECKING:
    from gtcompile.tools.finetune.loop import Training

LINES_PER_EPOCH = 8
"""Lines of progress without a terminal."""
BAR = 10
"""Columns of a live bar; with its counts and figures it fits into 80 columns."""


class Reporter:
    """Shows the progress of a run.

    Args:
        console: where to print; a terminal gets a live display.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Progress | None = None

    def say(self, text: str) -> None:
        """Print one line."""
        say(self.console, text)

    @contextlib.contextmanager
    def training(self, training: Training) -> Iterator[None]:
        """Show the training steps within the `with` block."""
        with self._display("training", training.total_steps):
            self._advance(training.steps, "")
            yield

    @contextlib.contextmanager
    def answering(self, prompts: int) -> Iterator[Callable[[int], None]]:
        """Show generation within the `with` block; yields a function to call with the number answered."""
        if not self.console.is_terminal:
            self.say(f"answering {prompts} prompts")
        with self._display("answering", prompts):
            yield lambda answered: self._advance(answered, "")

    def selected(self, selection: Mapping[str, Any]) -> None:
        """Show a new selection, as in `selections.json`."""
        share = selection["step_flops"] / selection["full_flops"]
        count = f"{len(selection['trained'])} of {selection['selectable']} parameters"
        self.say(f"epoch {selection['epoch'] + 1}: training {count}, {share:.1%} of a full step's FLOPs")

    def stepped(self, training: Training, loss: float, seconds: float) -> None:
        """Show a step that was taken."""
        per_epoch = training.prepared.steps_per_epoch
        done, selection = training.steps, training.selections[-1]
        full_flops = done * selection["full_flops"] * training.ranks.count
        spent = training.predicted_flops / full_flops
        text = f"loss {loss:.3f}  {seconds:.2f} s/step  FLOPs {spent:.1%}"
        if self._live is not None:
            self._advance(done, text)
        elif done % max(1, per_epoch // LINES_PER_EPOCH) == 0 or done % per_epoch == 0:
            epoch = f"epoch {(done - 1) // per_epoch + 1}/{training.prepared.settings.epochs}"
            parameters = f"{len(selection['trained'])} parameters"
            self.say(f"step {done}/{training.total_steps}  {epoch}  {text} of full  {parameters}")

    @contextlib.contextmanager
    def _display(self, name: str, total: int) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(BAR),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console) as live:
            live.add_task(name, total=total, text="")
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def _advance(self, completed: int, text: str) -> None:
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=completed, text=text)
