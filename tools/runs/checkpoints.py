"""Files that are whole or not there, and the state from which a run continues bit for bit."""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place in one step.

    Whatever happens in between, `path` holds the old content or the new, never a part.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """What the user wants withheld of a new file; temporary files are their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, records: list[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `path`, then put it in the place of `path`."""
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        write(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values, atomically."""
    write_atomically(path, lambda temporary: torch.save(dict(state), temporary))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; no code in it is run.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"nothing to resume: no checkpoint {path}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint: {str(error).partition(chr(10))[0]}") from error
    return state


def check_same_model(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse the weights of another model, before anything is loaded.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    saved = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{path} is a checkpoint of another model: {name} is {_shape(saved.get(name))} there "
            f"and {_shape(own.get(name))} here ({len(differing)} tensors differ)"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"{list(shape)}"
