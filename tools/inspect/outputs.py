"""Print an inspection and write its files."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from gtcompile.costs.explain import compare_trained_sets, explain
from gtcompile.errors import GTCompileError
from gtcompile.tools.common.terminal import say
from gtcompile.tools.inspect.graph_exports import export_graph
from gtcompile.tools.inspect.inspection import Inspection
from gtcompile.tools.inspect.options import Outputs
from gtcompile.tools.inspect.report import write_report
from gtcompile.tools.inspect.text import show, show_difference, show_why, trained_set
from gtcompile.tools.inspect.why import standing

WIDTH = 100
"""Columns of the output in a file or a pipe, which have no width."""


def output_console() -> Console:
    """A console as wide as the terminal, or `WIDTH` columns wide in a file or a pipe."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


def put_out(console: Console, inspection: Inspection, wanted: Outputs) -> None:
    """Print an inspection, then write its files, so that a failed write loses nothing that was printed.

    Raises:
        ValueError: a name matches nothing.
        GTCompileError: a file could not be written.
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
        values["why"] = [
            _plain(explain(joint, subject, trained)) | {"selection": _standing(inspection, subject)}
            for subject in wanted.why
        ]
    if wanted.diff:
        sets = [trained_set(inspection, text) for text in wanted.diff]
        values["diff"] = _plain(compare_trained_sets(joint, *sets))
    return values


def _standing(inspection: Inspection, subject: str) -> dict[str, object] | None:
    found = standing(inspection, subject)
    return None if found is None else _plain(found)


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
    """Name the wanted file in system errors, which name the temporary file that is written first."""
    try:
        yield
    except OSError as error:
        raise GTCompileError(f"could not write {path}: {error.strerror}") from error
