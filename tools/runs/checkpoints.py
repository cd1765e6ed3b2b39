"""The checkpoint of a run: the state from which training continues bit for bit."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gtcompile.tools.common.files import write_atomically


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
