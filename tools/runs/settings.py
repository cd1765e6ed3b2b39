"""Everything a fine-tuning run depends on."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

Method = Literal["adaptive", "full", "last-layers"]
Compiler = Literal["inductor", "eager"]

_AT_LEAST_ONE = (
    "epochs",
    "batch_size",
    "reselect_every",
    "num_beams",
    "max_train_samples",
    "max_eval_samples",
    "max_new_tokens",
    "checkpoint_every",
    "processes",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run, as it can be repeated; the defaults of training are the GreenTrainer paper's."""

    model: str
    """Hub id, local directory, or `demo`."""
    dataset: str
    """A known dataset or the path of a `.jsonl`, `.json` or `.csv` file."""
    tokenizer: str | None = None
    """Hub id or directory of another tokenizer, or `bytes`; None takes the model's own."""
    data_dir: str | None = None
    """Folder with the dataset's files; None loads from the hub."""
    source_field: str | None = None
    """Field of a file to read; None takes `source`."""
    target_field: str | None = None
    """Field of a file to answer with; None takes `target`."""
    train_split: str | None = None
    """Split to learn from, or a share such as `valid[:80%]`; None takes the usual one."""
    eval_split: str | None = None
    """Split to answer afterwards; None takes the usual one."""
    max_train_samples: int | None = None
    """Examples to learn from at most."""
    max_eval_samples: int | None = None
    """Examples to answer at most."""
    max_length: int = 512
    """Tokens of a sequence at most."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most; None takes the dataset's."""
    num_beams: int = 1
    """Beams of generation; 1 is greedy."""
    method: Method = "adaptive"
    """What is trained: the best within the budget, everything, or the last blocks that fit the budget."""
    budget: float = 0.5
    """Share of a full step's FLOPs that may be spent, in (0, 1]."""
    reselect_every: int = 1
    """Epochs between selections."""
    epochs: int = 5
    """Times every example is seen."""
    batch_size: int = 4
    """Examples per step."""
    lr: float = 2e-5
    """Learning rate at the first step; falls linearly to 0."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    seed: int = 0
    """Of dropout, the order of the examples and newly made weights."""
    compiler: Compiler = "eager"
    """Who compiles the rewritten graphs."""
    activation_memory_budget: float = 1.0
    """Share of what would be saved for backward that may be, in [0, 1]; the rest is computed again."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    processes: int = 1
    """Processes that share the training examples, each with batches of `batch_size`; torchrun's."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense, before any work.

        Raises:
            ValueError: naming the option, what was expected and what came.
        """
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            _expect(value is None or value >= 1, name, "at least 1", value)
        check_budget_option(self.budget)
        share = self.activation_memory_budget
        _expect(0 <= share <= 1, "activation_memory_budget", "in [0, 1]", share)
        _expect(0 < self.lr < math.inf, "lr", "greater than 0 and finite", self.lr)
        _expect(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0 and finite", self.weight_decay)
        _expect(self.max_length >= 16, "max_length", "at least 16", self.max_length)
        _expect(self.method in get_args(Method), "method", f"one of {_listed(Method)}", self.method)
        _expect(self.compiler in get_args(Compiler), "compiler", f"one of {_listed(Compiler)}", self.compiler)

    @property
    def title(self) -> str:
        """Method and budget in a few words."""
        return "full fine-tuning" if self.method == "full" else f"{self.method}, budget {self.budget:g}"

    @property
    def recomputes(self) -> bool:
        """Whether the backward computes again what there is no room to save."""
        return self.activation_memory_budget < 1

    @property
    def data_folder(self) -> Path | None:
        """`data_dir` as a path."""
        return None if self.data_dir is None else Path(self.data_dir)

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """What differs from the settings of a saved run, one phrase per setting."""
        own = self.as_dict()
        return [
            f"{_option(field.name)} was {saved.get(field.name)!r} and is now {own[field.name]!r}"
            for field in fields(self)
            if saved.get(field.name) != own[field.name]
        ]


def check_budget_option(budget: float | None) -> None:
    """Refuse a `--budget` that is no share, before any work.

    Raises:
        ValueError: it is outside (0, 1].
    """
    _expect(budget is None or 0 < budget <= 1, "budget", "in (0, 1]", budget)


def _expect(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{_option(name)}: expected {expected}, got {value!r}")


def _option(name: str) -> str:
    return "the number of processes" if name == "processes" else f"--{name.replace('_', '-')}"


def _listed(literal: Any) -> str:
    return ", ".join(get_args(literal))
