"""The progress of a run: live on a terminal, in plain lines elsewhere."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gtcompile.tools.common.terminal import say

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
    def display(self) -> Iterator[None]:
        """Keep a live display within the `with` block, if this is a terminal."""
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
        with Progress(*columns, console=self.console) as self._live:
            try:
                yield
            finally:
                self._live = None

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """Show a bar for `total` pieces of work, in a display."""
        if self._live is not None:
            self._live.add_task(name, total=total, completed=done, text="")

    def advance(self, done: int, text: str = "") -> None:
        """Show how many pieces of work are done."""
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=done, text=text)

    def selected(self, selection: Mapping[str, Any]) -> None:
        """Show a new selection, as in `selections.json`."""
        share = selection["step_flops"] / selection["full_flops"]
        count = f"{len(selection['trained'])} of {selection['selectable']} parameters"
        self.say(f"epoch {selection['epoch'] + 1}: training {count}, {share:.1%} of a full step's FLOPs")

    def stepped(
        self, step: Mapping[str, Any], *, steps: tuple[int, int], spent: float, parameters: int
    ) -> None:
        """Show a step that was taken.

        Args:
            step: as in `metrics.jsonl`.
            steps: of the run, and of an epoch.
            spent: FLOPs so far, as a share of those of full fine-tuning.
            parameters: how many the step trained.
        """
        done, (total, per_epoch) = step["step"], steps
        text = f"loss {step['loss']:.3f}  {step['seconds']:.2f} s/step  FLOPs {spent:.1%}"
        if self._live is not None:
            self.advance(done, text)
        elif done % max(1, per_epoch // LINES_PER_EPOCH) == 0 or done in (total, per_epoch):
            epoch = f"epoch {step['epoch'] + 1}/{-(-total // per_epoch)}"
            self.say(f"step {done}/{total}  {epoch}  {text} of full  {parameters} parameters")
