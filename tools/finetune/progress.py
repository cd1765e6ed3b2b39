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
    def bar(self, name: str, total: int) -> Iterator[None]:
        """On a terminal, show a bar for `total` pieces of work within the `with` block."""
        if not self.console.is_terminal:
            yield
            return
        what, text = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
        columns = (what, BarColumn(BAR), MofNCompleteColumn(), TimeRemainingColumn(), text)
        with Progress(*columns, console=self.console) as self._live:
            self._live.add_task(name, total=total, text="")
            try:
                yield
            finally:
                self._live = None

    def advance(self, done: int, text: str = "") -> None:
        """Show in the bar how many pieces of work are done."""
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=done, text=text)

    def stepped(self, step: Mapping[str, Any], spent: float, last: int, per_epoch: int, note: str) -> None:
        """Show a training step that was taken.

        Args:
            step: as in `metrics.jsonl`.
            spent: FLOPs so far, as a share of those of full fine-tuning.
            last: number of the last step.
            per_epoch: steps of an epoch.
            note: a few words for the end of a line.
        """
        done = step["step"]
        text = f"loss {step['loss']:.3f}  {step['seconds']:.2f} s/step  FLOPs {spent:.1%}"
        self.advance(done, text)
        if self._live is None and (done % max(1, per_epoch // LINES_PER_EPOCH) == 0 or done % per_epoch == 0):
            epoch = f"epoch {step['epoch'] + 1}/{-(-last // per_epoch)}"
            self.say(f"step {done}/{last}  {epoch}  {text} of full fine-tuning  {note}")
