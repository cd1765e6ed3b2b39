"""The options of `gtcompile compare`, checked before torch is imported."""

import importlib.util
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from gtcompile.tools.common.options import DEMO, check_counts, expect
from gtcompile.tools.compare.arms import ARMS
from gtcompile.tools.compare.datasets import FILES, find_data

PURPOSES = ("steps", "flops")
CompilerOrNone = Literal["inductor", "eager", "none"]

_COUNTS = (
    "steps",
    "batch_size",
    "length",
    "answer_length",
    "held_out",
    "evaluations",
    "selections",
    "measured",
    "save_every",
)
_FIXED = (
    "model",
    "dataset",
    "texts",
    "batch_size",
    "length",
    "answer_length",
    "held_out",
    "scored",
    "steps",
    "evaluations",
    "float32",
    "selections",
    "measured",
)
"""Options that all runs in one folder share; with others, losses could not be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What to compare."""

    model: str
    """Hub id, local directory with weights, `demo` or `smollm2`."""
    output: Path
    """Folder of the runs, the table and the plots."""
    dataset: str = "scitldr"
    """A name in `FILES`."""
    data_dir: Path | None = None
    """Folder with the authors' files of the data set; None for the hub, and for `demo`."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Methods, by their names in `ARMS`."""
    budgets: tuple[float, ...] = (0.5,)
    """Mean shares of a full step's FLOPs, in (0, 1]; every method that has a budget runs at each."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the order of examples and of random draws; every method runs with each."""
    steps: int = 100
    """Optimizer steps at equal steps."""
    purposes: tuple[str, ...] = PURPOSES
    """What methods are compared at: as many steps, or as many FLOPs, as full fine-tuning."""
    search: bool = False
    """Whether to choose learning rates at a quarter of the steps."""
    batch_size: int = 8
    """Texts per step."""
    length: int = 160
    """Tokens per text, its answer included."""
    answer_length: int = 40
    """Most tokens of an answer; longer ones are cut."""
    texts: int | None = None
    """How many texts to train on; None trains on all. Steps beyond one pass repeat them in another order."""
    held_out: int = 64
    """Held-out texts on which the loss is measured."""
    scored: int = 0
    """Held-out texts on which the metric of the data set is measured at the end of a run."""
    evaluations: int = 4
    """How often a run measures this loss."""
    selections: int = 2
    """How often a run selects, if its policy measures importance."""
    measured: int = 4
    """Batches on which each selection measures importance."""
    save_every: int = 20
    """Steps between saves of an unfinished run."""
    compiler: CompilerOrNone = "inductor"
    """Compiler of the blocks; `none` runs them eagerly."""
    float32: bool = False
    """Whether forwards run without bf16 autocast."""
    dry_run: bool = False
    """Whether to stop after the cost is printed."""
    plots: bool = True
    """Whether plots are drawn, with matplotlib."""
    device: str | None = None
    """Name of a torch device; None takes a GPU if there is one."""
    threads: int | None = None
    """Threads of torch on the CPU; None leaves the choice to torch."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ValueError: names the option, the expected value and the given one.
        """
        check_counts({name: getattr(self, name) for name in _COUNTS})
        optional = {"threads": self.threads, "texts": self.texts}
        check_counts({name: value for name, value in optional.items() if value is not None})
        _check_each("arms", self.arms, tuple(ARMS))
        _check_each("purposes", self.purposes, PURPOSES)
        _check_each("dataset", (self.dataset,), tuple(FILES))
        expect(self.scored >= 0, "scored", "at least 0", self.scored)
        in_range = all(0 < budget <= 1 for budget in self.budgets)
        expect(bool(self.budgets) and in_range, "budgets", "shares in (0, 1]", self.budgets)
        valid_seeds = all(seed >= 0 for seed in self.seeds)
        expect(bool(self.seeds) and valid_seeds, "seeds", "numbers of at least 0", self.seeds)
        self._check_data()

    def _check_data(self) -> None:
        if self.dataset == DEMO:
            expect(self.data_dir is None, "data_dir", "none with --dataset demo", str(self.data_dir))
        find_data(self.dataset, self.data_dir)

    def check_packages(self) -> None:
        """Refuse to start without the optional packages that these methods need.

        Raises:
            ImportError: names what is missing and how to install it.
        """
        with_adapters = any(ARMS[arm].adapted for arm in self.arms)
        needed = {"matplotlib": self.plots, "peft": with_adapters}
        missing = [name for name in needed if needed[name] and importlib.util.find_spec(name) is None]
        if missing:
            instead = "; --no-plots needs no matplotlib" if "matplotlib" in missing else ""
            raise ImportError(
                f'compare needs {" and ".join(missing)}: pip install "gtcompile[compare]"{instead}'
            )

    def check_output(self) -> None:
        """Refuse a folder whose runs have another model, other data or another shape.

        Raises:
            ValueError: names the options that differ.
        """
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output: {self.output} is a file; expected a folder")
        if not self.setting_file.is_file():
            return
        found, own = json.loads(self.setting_file.read_text("utf-8")), self.setting()
        differing = [name for name in own if found.get(name) != own[name]]
        if differing:
            raise ValueError(
                f"--output: {self.output} holds runs with other {', '.join(differing)}; choose another folder"
            )

    @property
    def setting_file(self) -> Path:
        """The file in the output folder that holds `setting()`."""
        return self.output / "setting.json"

    def setting(self) -> dict[str, Any]:
        """The options that all runs in one folder share, as JSON types."""
        shared = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _FIXED}
        return {**shared, "data_dir": None if self.data_dir is None else str(self.data_dir)}


def _check_each(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [value for value in values if value not in known]
    expect(bool(values) and not unknown, name, f"one of {', '.join(known)}", ", ".join(unknown))
