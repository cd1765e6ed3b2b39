"""The folder of a run: settings, metrics, selections, checkpoints, model and summary."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gtcompile.tools.common.files import read_lines, write_folder, write_json, write_lines, write_text
from gtcompile.tools.common.options import is_run
from gtcompile.tools.runs.settings import Settings

if TYPE_CHECKING:
    from gtcompile.tools.models.loading import LanguageModel

if sys.platform == "win32":  # has no such locks
    fcntl = None
else:
    import fcntl

LOCK = ".lock"
"""An empty file that the process which writes to the folder holds locked."""


class RunFolder:
    """The output of one run; it is made when the first file is written.

    `run.json` holds the settings, `metrics.jsonl` a line per step, `selections.json` what every selection
    trained, `checkpoint-<step>/` a state to resume from, `checkpoint` the name of the last one that is whole,
    `model/` the model with its tokenizer, `summary.json` the result.

    Args:
        path: of the folder.
        writes: false in a process that only reads; of several that train together, only the first writes.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._lock: IO[str] | None = None

    def check_new(self) -> None:
        """Refuse a path that is not free.

        Raises:
            ValueError: the path is a file, a folder that is not empty, or cannot be written.
        """
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"the output folder {self.path} is not empty. "
                f"Choose another --output, or continue the run in it with --resume {self.path}."
            )
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise ValueError(f"the output {self.path} cannot be made: {existing} is a file")
        if not os.access(existing, os.W_OK):
            raise ValueError(f"the output {self.path} cannot be made: {existing} cannot be written to")

    def hold(self) -> None:
        """Keep other processes from writing to the folder, until `close` or the end of this one.

        Raises:
            ValueError: another process holds it.
        """
        if not self.writes or fcntl is None:
            return
        self._lock = (self.path / LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ValueError(f"another process is writing to the output folder {self.path}") from error

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_settings(self) -> dict[str, Any]:
        """The content of `run.json`.

        Raises:
            ValueError: there is no run in the folder.
        """
        if not is_run(self.path):
            raise ValueError(f"nothing to resume: {self.path} holds no run")
        settings: dict[str, Any] = json.loads((self.path / "run.json").read_text("utf-8"))
        return settings

    def check_same_run(self, settings: Settings, digest: str | None = None) -> None:
        """Refuse to continue a run with other settings, except for more epochs, or on other examples.

        Args:
            settings: to continue with.
            digest: of the examples, if they are known yet.

        Raises:
            ValueError: there is no run here, or it was another; names the differences.
        """
        saved = self.read_settings()
        if differences := settings.differences(saved):
            raise ValueError(f"the run in {self.path} had other settings: {'; '.join(differences)}")
        if digest not in (None, saved["examples"]):
            raise ValueError(
                f"the run in {self.path} began with other examples: its data or tokenizer have changed since"
            )

    def begin(self, settings: Settings, described: Mapping[str, Any]) -> None:
        """Create the folder and write `run.json`.

        Args:
            settings: of the run.
            described: its batches as `described_batch` does, and the digest of its examples.

        Raises:
            ValueError: another process has begun a run here.
        """
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold()
            if is_run(self.path):
                raise ValueError(f"another run has started in {self.path}; choose another --output")
            write_json(self.path / "run.json", {**settings.as_dict(), **described})

    def extend(self, epochs: int) -> None:
        """Note that the run goes on, for this many epochs in all."""
        write_json(self.path / "run.json", {**self.read_settings(), "epochs": epochs})
        (self.path / "summary.json").unlink(missing_ok=True)

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        if self.writes:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of every step so far."""
        return read_lines(self.path / "metrics.jsonl")

    def write_selections(self, selections: Sequence[Mapping[str, Any]]) -> None:
        """Replace the selections."""
        if self.writes:
            write_json(self.path / "selections.json", list(selections))

    def cut(self, steps: int) -> list[dict[str, Any]]:
        """Drop everything after `steps` steps, since what follows the checkpoint is done again.

        Returns:
            The selections that stay.
        """
        write_lines(self.path / "metrics.jsonl", [m for m in self.metrics() if m["step"] <= steps])
        path = self.path / "selections.json"
        selections = json.loads(path.read_text("utf-8")) if path.is_file() else []
        kept: list[dict[str, Any]] = [s for s in selections if s["step"] < steps]
        self.write_selections(kept)
        return kept

    def note_checkpoint(self, name: str) -> None:
        """Note the name of the last checkpoint that is whole."""
        if self.writes:
            write_text(self.path / "checkpoint", name)

    def last_checkpoint(self) -> Path | None:
        """The last checkpoint that is whole; None before the first."""
        path = self.path / "checkpoint"
        return self.path / path.read_text("utf-8") if path.is_file() else None

    def save_model(self, language: LanguageModel) -> None:
        """Write model and tokenizer for `from_pretrained`."""

        def save(folder: Path) -> None:
            language.model.config.use_cache = True
            language.model.save_pretrained(folder)
            language.model.config.use_cache = False
            language.tokenizer.save_pretrained(folder)

        write_folder(self.path / "model", save)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the result: the run is finished."""
        write_json(self.path / "summary.json", dict(summary))

    def read_summary(self) -> dict[str, Any] | None:
        """The result of a finished run; None before."""
        path = self.path / "summary.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None


def next_free_folder(name: str) -> Path:
    """`runs/<name>-<n>` with the first n that is free."""
    n = 1
    while (path := Path("runs") / f"{name}-{n}").exists():
        n += 1
    return path
