"""Names and types of transformers' `TrainingArguments`, known without importing torch."""

import ast
import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

OURS = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "lr",
}
"""The settings of a run that transformers knows by another name."""
DECIDED = (
    "output_dir",
    "resume_from_checkpoint",
    "remove_unused_columns",
    "disable_tqdm",
    "dataloader_drop_last",
)
"""Arguments that a run decides itself."""
_PLAIN = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "None": (type(None),)}


@functools.cache
def known_arguments() -> dict[str, str]:
    """The annotation of every argument by its name, read from the source: importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None  # a dependency
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    return {
        node.target.id: ast.unparse(node.annotation)
        for file in ("training_args.py", "training_args_seq2seq.py")
        for kind in ast.parse((folder / file).read_text("utf-8")).body
        if isinstance(kind, ast.ClassDef) and kind.name.endswith("TrainingArguments")
        for node in kind.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if node.target.id not in DECIDED
    }


def check_type(name: str, value: Any, annotation: str) -> None:
    """Refuse a value of the wrong type, if the type is a plain one.

    Args:
        name: of the setting.
        value: that is given.
        annotation: such as `int | None`; nothing is checked if it names other types.

    Raises:
        ValueError: names the setting, the expected type and the value.
    """
    kinds = annotation.split(" | ")
    if all(kind in _PLAIN for kind in kinds) and not any(
        isinstance(value, _PLAIN[kind]) and (kind == "bool" or not isinstance(value, bool)) for kind in kinds
    ):
        raise ValueError(f"{name}: expected a value of type {annotation}, got {value!r}")


def parse_assignment(text: str) -> tuple[str, str]:
    """Read the name and the value of `name=value`.

    Raises:
        ValueError: there is no name or no equals sign.
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--args: expected name=value, such as warmup_steps=100, got {text!r}")
    return name, value


def parse_value(text: str, annotation: str) -> Any:
    """Read a value that was given as text, as JSON or Python writes it.

    Args:
        text: a number, a truth value, None, a list or a dictionary; else it is the value itself.
        annotation: such as `int | None`. Where it allows text, numbers and truth values stay text.

    >>> parse_value("1e-1", "float"), parse_value("True", "bool"), parse_value("2024", "str | None")
    (0.1, True, '2024')
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    stays = "str" in annotation.split(" | ") and isinstance(value, (bool, int, float))
    return text if stays else value
