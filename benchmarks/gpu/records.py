"""The results of the stages on disk: one file per stage, complete at every moment."""

import dataclasses
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gtcompile.tools.bench.measurement import describe_machine
from gtcompile.tools.common.files import write_json

_PACKAGES = ("torch", "transformers", "peft")
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What was measured, and where; results with another header do not belong in the same folder."""

    card: str
    """Name of the device."""
    tiny: bool
    """Whether sizes were those of a test."""
    commit: str
    """Of gtcompile, with a plus sign if files had changed; `unknown` without git."""
    versions: Mapping[str, str]
    """Of Python and packages."""

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.card}; {versions}; commit {self.commit}{', tiny sizes' if self.tiny else ''}"


def describe(device: str, tiny: bool, commit: str | None, _deadline: float) -> Iterator[Header]:
    """Yield the header of this machine and checkout.

    Args:
        device: torch's name of the device.
        tiny: whether sizes are those of a test.
        commit: of gtcompile; None asks git.

    Raises:
        RuntimeError, AssertionError: this machine has no such device.
    """
    place = torch.empty(0, device=device).device
    versions = {"Python": platform.python_version()}
    versions |= {name: _version(name) for name in ("gtcompile", *_PACKAGES)}
    if place.type == "cuda":
        card = torch.cuda.get_device_name(place)
        versions["CUDA"] = str(torch.version.cuda)
    else:
        card = describe_machine(place).partition(",")[0]
    yield Header(card=card, tiny=tiny, commit=commit or _commit(), versions=versions)


def _version(package: str) -> str:
    return torch.__version__ if package == "torch" else metadata.version(package)


def _commit() -> str:
    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """The results of one stage so far."""

    folder: Path
    stage: str
    header: Header
    results: Mapping[str, Any] = field(default_factory=dict)
    """By unit; a unit that was stopped may have a part of its result."""
    finished: tuple[str, ...] = ()
    """Units that need not be measured again."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """By unit, why it did not finish."""
    seconds: float = 0.0
    """Taken so far."""

    def write(self) -> None:
        """Write the file; readers find the old content or the new one."""
        value = dataclasses.asdict(self)
        del value["folder"]
        write_json(self.folder / f"{self.stage}.json", value)


def read(folder: Path, stage: str) -> Saved | None:
    """The saved results of a stage; None if there are none."""
    path = folder / f"{stage}.json"
    if not path.is_file():
        return None
    value = json.loads(path.read_text("utf-8"))
    value |= {"header": Header(**value["header"]), "finished": tuple(value["finished"])}
    return Saved(folder=folder, **value)


def results_of(folder: Path, stage: str) -> Mapping[str, Any]:
    """The results of a stage in a folder, by unit; empty if it has not run."""
    saved = read(folder, stage)
    return {} if saved is None else saved.results
