"""The folder of a run: settings, metrics, selections, checkpoint, model and summary."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gtcompile.tools.common.files import write_folder, write_json, write_lines
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

    `run.json` holds the settings, `metrics.jsonl` a line per step, `selections.json` what was trained in each
    epoch, `checkpoint.pt` the state to resume from, `model/` the model with its tokenizer, `summary.json` the
    result.

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
            ValueError: the path is a file, or a folder that is not empty.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"the output {self.path} is a file; expected a folder that is empty or does not exist"
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(
                f"the output folder {self.path} is not empty. "
                f"Choose another --output, or continue the run in it with --resume."
            )
        self._check_writable()

    def _check_writable(self) -> None:
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        try:
            tempfile.TemporaryDirectory(dir=existing).cleanup()
        except OSError as error:
            raise ValueError(
                f"the output {self.path} cannot be written: {existing}: {error.strerror}"
            ) from error

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

    def check_same_run(self, settings: Settings, *, besides: Collection[str] = ()) -> None:
        """Refuse to continue a run with other settings.

        Args:
            settings: to continue with.
            besides: names of settings that are not compared.

        Raises:
            ValueError: there is no run here, or it had other settings; names them.
        """
        if not is_run(self.path):
            raise ValueError(f"nothing to resume: {self.path} holds no run")
        saved = json.loads((self.path / "run.json").read_text("utf-8"))
        differences = settings.differences(saved, besides=besides)
        if differences:
            raise ValueError(f"the run in {self.path} had other settings: {'; '.join(differences)}")

    def check_same_examples(self, digest: str) -> None:
        """Refuse to continue a run on other examples.

        Args:
            digest: of the examples; runs of older versions have none.

        Raises:
            ValueError: the run began with others.
        """
        began = json.loads((self.path / "run.json").read_text("utf-8")).get("examples", digest)
        if began != digest:
            raise ValueError(
                f"the run in {self.path} began with other examples: its data or tokenizer have changed since"
            )

    def write_settings(self, settings: Settings, batch: Mapping[str, Any]) -> None:
        """Create the folder and write `run.json`.

        Args:
            settings: of the run.
            batch: the description of its batches by `described_batch`, and the digest of its examples.

        Raises:
            ValueError: another process has begun a run here.
        """
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold()
            if (self.path / "run.json").exists():
                raise ValueError(f"another run has started in {self.path}; choose another --output")
            write_json(self.path / "run.json", {**settings.as_dict(), **batch})

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        if self.writes:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def cut_metrics(self, steps: int) -> None:
        """Drop the lines after `steps` steps, since the steps after the checkpoint are taken again."""
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        write_lines(path, [record for record in records if record["step"] <= steps])

    def write_selections(self, selections: Sequence[Mapping[str, Any]]) -> None:
        """Replace the selections."""
        if self.writes:
            write_json(self.path / "selections.json", list(selections))

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        if self.writes:
            from gtcompile.tools.runs.checkpoints import save_checkpoint  # imports torch

            save_checkpoint(self.checkpoint, state)

    def load_state(self) -> dict[str, Any]:
        """Read the checkpoint.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        from gtcompile.tools.runs.checkpoints import load_checkpoint  # imports torch

        return load_checkpoint(self.checkpoint)

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint."""
        return self.path / "checkpoint.pt"

    def save_model(self, language: LanguageModel) -> None:
        """Write model and tokenizer for `from_pretrained`."""
        write_folder(self.path / "model", lambda folder: _save(language, folder))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the result: the run is finished."""
        write_json(self.path / "summary.json", dict(summary))

    def read_summary(self) -> dict[str, Any] | None:
        """The result of a finished run; None before."""
        path = self.path / "summary.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _save(language: LanguageModel, folder: Path) -> None:
    model = language.model
    model.config.use_cache = True
    try:
        model.save_pretrained(folder)
    finally:
        model.config.use_cache = False
    language.tokenizer.save_pretrained(folder)


def next_free_folder(name: str) -> Path:
    """`runs/<name>-<n>` with the first n that is free."""
    n = 1
    while (path := Path("runs") / f"{name}-{n}").exists():
        n += 1
    return path
