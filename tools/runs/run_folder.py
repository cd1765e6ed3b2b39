"""The folder of a run: settings, metrics, selections, checkpoint, model and summary."""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gtcompile.tools.common.files import read_lines, write_folder, write_json, write_lines
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
    trained, `checkpoint-<step>/` the state to resume from, `model/` the model with its tokenizer,
    `summary.json` the result.

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
                f"Choose another --output, or continue the run in it with --resume {self.path}."
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

    def check_same_run(self, settings: Settings) -> None:
        """Refuse to continue a run with other settings, except for more epochs.

        Args:
            settings: to continue with.

        Raises:
            ValueError: there is no run here, or it had other settings; names them.
        """
        self.check_holds_a_run()
        if differences := settings.differences(self.read_settings()):
            raise ValueError(f"the run in {self.path} had other settings: {'; '.join(differences)}")

    @property
    def begun(self) -> bool:
        """Whether there is a run in the folder."""
        return is_run(self.path)

    def check_holds_a_run(self) -> None:
        """Refuse a folder without a run.

        Raises:
            ValueError: there is no `run.json`.
        """
        if not self.begun:
            raise ValueError(f"nothing to resume: {self.path} holds no run")

    def read_settings(self) -> dict[str, Any]:
        """The content of `run.json`."""
        settings: dict[str, Any] = json.loads((self.path / "run.json").read_text("utf-8"))
        return settings

    def check_same_examples(self, digest: str) -> None:
        """Refuse to continue a run on other examples.

        Args:
            digest: of the examples; runs of older versions have none.

        Raises:
            ValueError: the run began with others.
        """
        began = self.read_settings().get("examples", digest)
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
            if self.begun:
                raise ValueError(f"another run has started in {self.path}; choose another --output")
            write_json(self.path / "run.json", {**settings.as_dict(), **batch})

    def extend(self, epochs: int) -> None:
        """Note that the run has more epochs than it began with, and is not finished."""
        write_json(self.path / "run.json", {**self.read_settings(), "epochs": epochs})
        (self.path / "summary.json").unlink(missing_ok=True)

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics."""
        if self.writes:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of every step so far; a line that was cut off by a kill is left out."""
        return read_lines(self.path / "metrics.jsonl")

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

    def write_selections(self, selections: Sequence[Mapping[str, Any]]) -> None:
        """Replace the selections."""
        if self.writes:
            write_json(self.path / "selections.json", list(selections))

    def last_checkpoint(self, processes: int) -> Path | None:
        """The newest checkpoint that is whole; a kill may have cut off a newer one.

        Args:
            processes: that wrote it; each has a file of its own.
        """
        found = self.path.glob("checkpoint-*")
        newest = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
        return next((path for path in newest if is_whole(path, processes)), None)

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


def is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether a checkpoint was written to its end: `Trainer` writes file by file, its own state last.

    Args:
        checkpoint: a folder.
        processes: that wrote it; each has a file with its random state.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    archives = [path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")]
    states = sum(path.name.startswith("rng_state") for path in archives)
    weights = checkpoint.glob("*.safetensors")
    return states == processes and all(map(zipfile.is_zipfile, archives)) and all(map(_fits_header, weights))


def _fits_header(weights: Path) -> bool:
    """Whether a file of safetensors is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def next_free_folder(name: str) -> Path:
    """`runs/<name>-<n>` with the first n that is free."""
    n = 1
    while (path := Path("runs") / f"{name}-{n}").exists():
        n += 1
    return path
