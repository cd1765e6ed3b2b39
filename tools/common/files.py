"""Write text, JSON and folders so that readers find the old content or the new one, never a part."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gtcompile.files import write_atomically


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, records: list[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line; empty without the file, and without a last line that was cut off."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder next to `path`, then replace `path` by it.

    If anything fails, `path` is the old folder. A kill between the two renames leaves both folders, complete,
    as `old` and `new` in a hidden folder next to `path`.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as hidden:
        old, new = Path(hidden, "old"), Path(hidden, "new")
        new.mkdir()  # with the permissions of any new folder, which the hidden one does not have
        write(new)
        try:
            if path.exists():
                os.replace(path, old)
            os.replace(new, path)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
