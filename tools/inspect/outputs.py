"""What `gtcompile inspect` prints and writes of one inspection."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gtcompile.costs.explain import compare_trained_sets, explain
from gtcompile.errors import GTCompileError
from gtcompile.tools.common.terminal import say
from gtcompile.tools.inspect.graph_exports import check_format, export_graph
from gtcompile.tools.inspect.inspection import Inspection
from gtcompile.tools.inspect.report import write_report
from gtcompile.tools.inspect.text import check_order, show, show_difference, show_why, trained_set

WIDTH = 100
"""Columns where there is no terminal that has a width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What was asked for."""

    only: str | None = None
    """Path segments that listed parameters have."""
    order: str = "cost"
    """What parameters are sorted by."""
    top: int = 12
    """Parameters to list at most; 0 for all."""
    why: tuple[str, ...] = ()
    """Parameters and nodes to explain."""
    diff: tuple[str, str] | None = None
    """Two trained sets to compare."""
    html: Path | None = None
    """Where the report goes."""
    export: Path | None = None
    """Where the graph goes."""
    as_json: bool = False
    """Whether to print JSON."""

    def __post_init__(self) -> None:
        """Refuse what cannot be written or means nothing, before any work.

        Raises:
            ValueError: a path that cannot be written, an unknown format, or a negative number of rows.
        """
        if self.top < 0:
            raise ValueError(f"--top: expected at least 0, got {self.top}")
        check_order(self.order)
        if self.export is not None:
            check_format(self.export)
        for option, path in (("--html", self.html), ("--export", self.export)):
            if path is not None:
                check_writable(option, path)


def check_writable(option: str, path: Path) -> None:
    """Refuse a file that could not be written.

    Raises:
        ValueError: it is a folder, or there is no folder for it that may be written to.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; expected the path of a file")
    if not folder.is_dir():
        raise ValueError(f"{option}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: the folder {folder} may not be written to")


def output_console() -> Console:
    """Where an inspection is printed: as wide as the terminal, and `WIDTH` columns in a file or a pipe."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


def put_out(console: Console, inspection: Inspection, wanted: Outputs) -> None:
    """Print an inspection and write the files asked for; what is printed comes first, so it is not lost.

    Raises:
        ValueError: a name that matches nothing.
        GTCompileError: a file could not be written after all.
    """
    if wanted.as_json:
        print(json.dumps(as_json(inspection, wanted), indent=2))
    elif wanted.why or wanted.diff:
        for subject in wanted.why:
            show_why(console, inspection, subject)
        if wanted.diff:
            show_difference(console, inspection, *wanted.diff)
    else:
        show(console, inspection, only=wanted.only, order=wanted.order, top=wanted.top)
    written = _write(inspection, wanted)
    if not wanted.as_json:
        say(console, *(f"written: {path}" for path in written))


def as_json(inspection: Inspection, wanted: Outputs) -> dict[str, object]:
    """The inspection, explanations and difference as plain values."""
    trained, joint = inspection.selection.trained, inspection.joint
    values = inspection.as_dict()
    if wanted.why:
        values["why"] = [_plain(explain(joint, subject, trained)) for subject in wanted.why]
    if wanted.diff:
        sets = [trained_set(inspection, text) for text in wanted.diff]
        values["diff"] = _plain(compare_trained_sets(joint, *sets))
    return values


def _plain(value: object) -> dict[str, object]:
    fields = {name: getattr(value, name) for name in value.__dataclass_fields__}  # type: ignore[attr-defined]
    return {name: sorted(field) if isinstance(field, frozenset) else field for name, field in fields.items()}


def _write(inspection: Inspection, wanted: Outputs) -> tuple[Path, ...]:
    written: tuple[Path, ...] = ()
    if wanted.html is not None:
        with _naming(wanted.html):
            write_report(inspection, wanted.html)
        written += (wanted.html,)
    if wanted.export is not None:
        with _naming(wanted.export):
            written += export_graph(inspection.joint, inspection.selection.trained, wanted.export)
    return written


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The system's errors name the file asked for, not the temporary one that is written first."""
    try:
        yield
    except OSError as error:
        raise GTCompileError(f"could not write {path}: {error.strerror}") from error
