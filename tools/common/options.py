"""Checks of command-line options. They need no torch, so that a mistake is refused at once."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
DEMO = "demo"
"""The name of the model that is part of this package."""


def option(name: str) -> str:
    """The option that sets a field: `--batch-size` for `batch_size`."""
    return f"--{name.replace('_', '-')}"


def expect(condition: bool, name: str, expected: str, value: object) -> None:
    """Refuse the value of an option.

    Args:
        condition: whether the value is right.
        name: of the field that the option sets.
        expected: description of right values, such as "at least 1".
        value: the given value.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{option(name)}: expected {expected}, got {value!r}")


def check_counts(counts: Mapping[str, int]) -> None:
    """Refuse counts below 1, by the name of their option.

    Raises:
        ValueError: a count is 0 or negative.
    """
    for name, value in counts.items():
        expect(value >= 1, name, "at least 1", value)


def parse_list(name: str, text: str, kind: Callable[[str], T], expected: str) -> tuple[T, ...]:
    """Read values separated by commas; what is repeated counts once.

    Args:
        name: of the field that the option sets.
        text: the value of the option.
        kind: converts one value, and raises `ValueError` for any that is not valid.
        expected: description of valid values, such as "numbers".

    Raises:
        ValueError: a value is not valid.

    >>> parse_list("budgets", "0.4,0.5", float, "numbers")
    (0.4, 0.5)
    """
    try:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ValueError(f"{option(name)}: expected {expected} separated by commas, got {text!r}") from None


def check_budget(budget: float | None) -> None:
    """Refuse a `--budget` that is not a share of a full step.

    Raises:
        ValueError: it is outside (0, 1].
    """
    expect(budget is None or 0 < budget <= 1, "budget", "in (0, 1]", budget)


def check_writable(name: str, path: Path) -> None:
    """Refuse a file that could not be written.

    Args:
        name: of the option, such as `--html`.
        path: of the file.

    Raises:
        ValueError: the path is a folder, or its folder does not exist or cannot be written to.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"{name}: {path} is a folder; expected the path of a file")
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{name}: the folder {folder} cannot be written to")


def is_local(model: str) -> bool:
    """Whether the name of a model is a path and not a hub id."""
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def is_run(path: Path) -> bool:
    """Whether a folder is the output of `gtcompile finetune`."""
    return (path / "run.json").is_file()


def check_model(model: str) -> None:
    """Refuse a local path that holds no model.

    Raises:
        ValueError: the path holds no `config.json`.
    """
    if model != DEMO and is_local(model) and not (Path(model) / "config.json").is_file():
        raise ValueError(f"no model in {model!r}: expected a directory with a config.json, a hub id, or demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The shape of a batch of tokens."""

    batch_size: int = 4
    """Rows."""
    length: int = 512
    """Input tokens per row."""
    target_length: int = 64
    """Answer tokens per row; an encoder-decoder alone has them."""

    def __post_init__(self) -> None:
        """Refuse an empty batch.

        Raises:
            ValueError: a size is below 1.
        """
        check_counts({field.name: getattr(self, field.name) for field in fields(self)})

    def label_columns(self, encoder_decoder: bool) -> int:
        """Columns of the labels: answer tokens of an encoder-decoder, input tokens of a decoder."""
        return self.target_length if encoder_decoder else self.length

    def describe(self, encoder_decoder: bool) -> str:
        """The shape in words, such as "4 x 512 tokens, 64 answer tokens"."""
        answer = f", {self.target_length} answer tokens" if encoder_decoder else ""
        return f"{self.batch_size} x {self.length} tokens{answer}"
