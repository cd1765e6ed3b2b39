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
NOT_TO_SET = {
    "output_dir": "pass --output",
    "resume_from_checkpoint": "pass --resume with the folder of the run",
    "remove_unused_columns": "batches hold what the model takes, and nothing else",
}
"""Arguments that a run decides, with what to do instead."""
_KINDS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}


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
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id.islower()
    }


def check_argument(name: str, value: Any) -> None:
    """Refuse a value of the wrong type where the type is a plain one, and an argument that a run decides.

    Raises:
        ValueError: names the argument, the expected type and the value.
    """
    if name in NOT_TO_SET:
        raise ValueError(f"{name} cannot be set; {NOT_TO_SET[name]}")
    annotation, *rest = known_arguments()[name].split(" | ")
    kinds = _KINDS.get(annotation)
    if kinds is None or rest not in ([], ["None"]) or (rest and value is None):
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and annotation != "bool"):
        raise ValueError(f"{name}: expected a value of type {annotation}, got {value!r}")


def parse_assignment(text: str) -> tuple[str, Any]:
    """Read the name and the value of `name=value`.

    Raises:
        ValueError: there is no name or no value.

    >>> parse_assignment("warmup_ratio=1e-1"), parse_assignment("bf16=true"), parse_assignment("optim=sgd")
    (('warmup_ratio', 0.1), ('bf16', True), ('optim', 'sgd'))
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--args: expected name=value, such as warmup_steps=100, got {text!r}")
    return name, parse_value(value)


def parse_value(text: str) -> Any:
    """A number, a truth value, None, a list or a dictionary as JSON or Python writes it; else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)
