"""Finished runs, kept on disk."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from gtcompile.tools.common.files import write_lines
from gtcompile.tools.common.terminal import say

Row = dict[str, Any]
_LATER = {"scores": {}, "starting_seconds": 0.0, "scoring_seconds": 0.0}
"""What rows of earlier versions lack, and what it is then."""


class Records:
    """Finished runs by key, one JSON line each. A line that was cut off when the process ended is dropped.

    Args:
        path: of the file; it need not exist.
        console: where to say that a line was dropped.
    """

    def __init__(self, path: Path, console: Console) -> None:
        self._path = path
        self.rows: dict[str, Row] = {}
        for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
            try:
                row: Row = {**_LATER, **json.loads(line)}
            except json.JSONDecodeError:
                say(console, f"{path}: dropped an incomplete line")
                continue
            self.rows[row["key"]] = row
        if path.is_file():  # nothing is added to a line that was cut off
            write_lines(path, list(self.rows.values()))

    def add(self, row: Row) -> None:
        """Keep a run, on disk before this returns."""
        self.rows[row["key"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
