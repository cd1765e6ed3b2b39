"""Everything that a fine-tuning run depends on; checked before torch is imported."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from gtcompile.costs.budgets import WHOLE, BudgetOf
from gtcompile.graph.names import near_names
from gtcompile.tools.common.options import check_budget, check_model, expect, option, parse_list
from gtcompile.tools.data.tasks import Source, find_source
from gtcompile.tools.models.adapters import ALL_LINEAR
from gtcompile.tools.runs.training_arguments import OURS, check_type, known_arguments, parse_value

Policy = Literal[
    "best",
    "sampled",
    "last_layers",
    "random",
    "rotating",
    "lisa",
    "occasionally_full",
    "progressive",
    "paper",
    "full",
]
"""The policies of `gtcompile.policies`, and `full`, which trains everything whatever the budget."""
Compiler = Literal["inductor", "eager"]
CompilerOrAuto = Literal["auto", "inductor", "eager"]
"""A compiler, or `auto`: the one that is measured to take less time."""
LR = 2e-5
"""Learning rate of weights, if none is given."""
LORA_RATES = 10
"""Learning rate of adapters over that of weights, as in the comparison of methods."""
LORA_LR = LORA_RATES * LR
"""Learning rate of adapters, if none is given."""
RECORDED = ("format", "batch_shape", "batch", "examples")
"""What `run.json` holds in addition to the settings."""

_AT_LEAST_ONE = (
    "epochs",
    "batch_size",
    "reselect_every",
    "num_beams",
    "max_train_samples",
    "max_eval_samples",
    "max_new_tokens",
    "processes",
    "lora",
    "lora_alpha",
)
_CHANGE_NO_RESULT = ("prefix_cache", "grid_intensity", "watts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings from which a run can be repeated; training defaults are the GreenTrainer paper's."""

    model: str
    """Hub id, local directory, or `demo`."""
    dataset: str
    """A known dataset, the path of a file, or a dataset of the hub."""
    tokenizer: str | None = None
    """Hub id or directory of another tokenizer, or `bytes`; None takes the model's own."""
    data_dir: str | None = None
    """Folder with the dataset's files; None loads from the hub."""
    source_field: str | None = None
    """Field of a file that holds the text; None takes `source`."""
    target_field: str | None = None
    """Field of a file that holds the answer; None takes `target`."""
    train_split: str | None = None
    """Split to train on, or a share such as `valid[:80%]`; None takes the usual one."""
    eval_split: str | None = None
    """Split to evaluate on; None takes the usual one."""
    max_train_samples: int | None = None
    """Largest number of training examples."""
    max_eval_samples: int | None = None
    """Largest number of evaluation examples."""
    max_length: int = 512
    """Longest sequence, in tokens."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; None takes the dataset's."""
    num_beams: int = 1
    """Beams of generation; 1 is greedy."""
    policy: Policy = "best"
    """How the trained set is selected within the budget, or `full`."""
    budget: float = 0.5
    """Share of FLOPs that a step may take, in (0, 1]; `budget_of` says of which."""
    budget_of: BudgetOf = "step"
    """What the budget is a share of: a full step of the model as it is, with adapters if it has any, or a
    step of full fine-tuning without them."""
    budget_seconds: float | None = None
    """Seconds that a step may take; None for no limit."""
    budget_memory: int | None = None
    """Bytes that training may take beside the weights; None for no limit."""
    lora: int | None = None
    """Rank of low-rank adapters, which alone are trained; None trains the weights themselves."""
    lora_alpha: int | None = None
    """Adapters are scaled by it over their rank; None takes twice the rank."""
    target_modules: str | None = None
    """Names of the layers that get adapters, separated by commas; None takes all linear layers."""
    reselect_every: int = 1
    """Epochs between selections."""
    epochs: int = 5
    """Passes over the training examples."""
    batch_size: int = 4
    """Examples per step."""
    lr: float = LR
    """Learning rate at the first step; falls linearly to 0."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    seed: int = 0
    """Seed of dropout, of the order of the examples and of newly made weights."""
    compiler: CompilerOrAuto = "eager"
    """The compiler of the graphs. The command's default is `auto`; `run.json` holds what was chosen."""
    activation_memory_budget: float = 1.0
    """Share of the bytes saved for backward that may be kept, in [0, 1]; the rest is recomputed."""
    prefix_cache: str | None = None
    """Where outputs of frozen blocks near the input are kept: `memory`, or a folder; None keeps none."""
    labelled_logits: bool = False
    """Whether the head and the loss are computed at labelled positions alone."""
    grid_intensity: float | None = None
    """Grams of CO2 equivalent per kilowatt hour, from which the run's carbon follows; None for none."""
    watts: float | None = None
    """What all devices of the run draw, for an estimate of its energy; None for no estimate."""
    processes: int = 1
    """Processes of torchrun that share the training examples, each with batches of `batch_size`."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments of transformers' `TrainingArguments`."""

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            ValueError: names the option, the expected value and the given one.
        """
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            expect(value is None or value >= 1, name, "at least 1", value)
        check_budget(self.budget)
        for name in ("budget_seconds", "budget_memory", "grid_intensity", "watts"):
            value = getattr(self, name)
            expect(value is None or 0 < value < math.inf, name, "greater than 0 and finite", value)
        further = [name for name in ("budget_seconds", "budget_memory") if getattr(self, name) is not None]
        if further:
            expect(self.policy == "best", "policy", f"best, which {option(further[0])} needs", self.policy)
        check_model(self.model)
        share = self.activation_memory_budget
        expect(0 <= share <= 1, "activation_memory_budget", "in [0, 1]", share)
        expect(0 < self.lr < math.inf, "lr", "greater than 0 and finite", self.lr)
        expect(0 <= self.weight_decay < math.inf, "weight_decay", "at least 0 and finite", self.weight_decay)
        expect(self.max_length >= 16, "max_length", "at least 16", self.max_length)
        expect(self.policy in get_args(Policy), "policy", f"one of {_listed(Policy)}", self.policy)
        compilers = f"one of {_listed(CompilerOrAuto)}"
        expect(self.compiler in get_args(CompilerOrAuto), "compiler", compilers, self.compiler)
        expect(
            self.budget_of in get_args(BudgetOf), "budget_of", f"one of {_listed(BudgetOf)}", self.budget_of
        )
        self._check_lora()

    def _check_lora(self) -> None:
        for name in ("lora_alpha", "target_modules"):
            if self.lora is None and (value := getattr(self, name)) is not None:
                raise ValueError(f"{option(name)} {value} needs adapters: give their rank, such as --lora 16")
        targets = self.targets
        named = bool(targets) and (ALL_LINEAR not in targets or len(targets) == 1)
        expected = f"names of linear layers separated by commas, or {ALL_LINEAR} alone"
        expect(named, "target_modules", expected, self.target_modules)

    @property
    def targets(self) -> tuple[str, ...]:
        """The last parts of the names of the layers that get adapters, or `all-linear` alone."""
        given = ALL_LINEAR if self.target_modules is None else self.target_modules
        return parse_list("target_modules", given, str, "names")

    @property
    def title(self) -> str:
        """Adapters, policy and budget in a few words."""
        base = f"{self.policy}, {self._budgets}"
        if self.policy == "full":
            base = "full fine-tuning" if self.lora is None else "all adapters"
        if self.lora is not None:
            base = f"LoRA of rank {self.lora}, {base}"
        cached = ", prefix cache" if self.prefix_cache else ""
        return base + (", labelled logits" if self.labelled_logits else "") + cached

    @property
    def selects_once(self) -> bool:
        """Whether the first selection stays: nothing is measured, so a later one would be the same."""
        return self.policy in ("full", "last_layers")

    @property
    def grouped(self) -> bool:
        """Whether batches hold examples of similar length, and are padded to the longest of them alone."""
        return self.args.get("train_sampling_strategy") == "group_by_length"

    @property
    def _budgets(self) -> str:
        """The budgets in a few words."""
        seconds, memory = self.budget_seconds, self.budget_memory
        further = [f"{seconds:g} s a step"] if seconds is not None else []
        further += [f"{memory / 1e6:,.1f} MB"] if memory is not None else []
        whole = "" if self.lora is None else f" of {WHOLE[self.budget_of]}"
        share = [] if further and self.budget == 1 else [f"{self.budget:g}{whole}"]
        return "budget " + ", ".join([*share, *further])

    @property
    def short_name(self) -> str:
        """Model, data and policy in a name for a folder."""
        method = self.policy if self.lora is None else f"lora-{self.policy}"
        return f"{Path(self.model).name}-{Path(self.dataset).stem}-{method}"

    @property
    def recomputes(self) -> bool:
        """Whether the backward recomputes activations to save memory."""
        checkpoints = self.args.get("activation_checkpointing") or self.args.get("gradient_checkpointing")
        return bool(checkpoints) or self.activation_memory_budget < 1

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values by name."""
        return asdict(self)

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """The differences from the settings of a saved run, one phrase per setting.

        More epochs are none, except for `progressive`, whose sets depend on the number of steps. Another
        place for the prefix cache is none, or what energy is computed from: they change no result.
        """
        former = {**_DEFAULTS, **saved, **{name: getattr(self, name) for name in _CHANGE_NO_RESULT}}
        if self.compiler == "auto":  # what was chosen at first stays
            former["compiler"] = "auto"
        return [
            f"{_phrase(name)} was {former.get(name)!r} and is now {value!r}"
            for name, value in self.as_dict().items()
            if former.get(name) != value and not (name == "epochs" and self._extends(former[name]))
        ]

    def _extends(self, former_epochs: int) -> bool:
        return self.policy != "progressive" and self.epochs > former_epochs


_DEFAULTS = {known.name: known.default for known in fields(Settings) if known.default is not MISSING}
"""What a run has done whose `run.json` was written before a setting was made."""


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Make settings of values by the names of `Settings` or of transformers' `TrainingArguments`.

    Raises:
        ValueError: an unknown name (lists the nearest ones), a wrong value, no model or no data.
    """
    kinds = {s.name: getattr(s.type, "__name__", str(s.type)) for s in fields(Settings)}
    own: dict[str, Any] = {"args": {}}
    args = values.get("args") or {}
    if not isinstance(args, Mapping):
        raise ValueError(f"args: expected names of TrainingArguments with their values, got {args!r}")
    for key, value in {**args, **values}.items():
        name = OURS.get(key, key)
        kind = kinds.get(name) or known_arguments().get(name)
        if kind is None:
            near = near_names(key, [*kinds, *known_arguments()])
            raise ValueError(
                f"{key!r} is neither an option of finetune nor of transformers' TrainingArguments; {near}"
            )
        if name != "args":
            read = parse_value(value, kind) if isinstance(value, str) else value
            check_type(name, read, kind)
            (own if name in kinds else own["args"])[name] = read
    for needed in ("model", "dataset"):
        if needed not in own:
            raise ValueError(f"expected {option(needed)}, or a --config or --resume that names it")
    return Settings(**{**_defaults_beside(own), **own})


def _defaults_beside(given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that depend on what is given."""
    defaults: dict[str, Any] = {"compiler": "auto"}
    if given.keys() & {"budget_seconds", "budget_memory"}:
        defaults["budget"] = 1.0  # FLOPs are not limited unless the user says so
    if given.get("lora") is not None:
        defaults |= {"lr": LORA_LR, "budget_of": "full_finetuning"}
    return defaults


def read_config(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file, or from the `run.json` of a run.

    Raises:
        ValueError: the file cannot be read, or holds something else than names with values.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected one setting a line, such as epochs: 3, got {values!r}")
    return {key: value for key, value in values.items() if key not in RECORDED}


def source_of(settings: Settings) -> Source:
    """Find the dataset of a run, without reading it.

    Raises:
        ValueError: there is no such dataset, folder or split, or the two splits share records.
    """
    return find_source(
        settings.dataset,
        data_dir=None if settings.data_dir is None else Path(settings.data_dir),
        splits=(settings.train_split, settings.eval_split),
        fields=(settings.source_field, settings.target_field),
    )


def _phrase(name: str) -> str:
    return "the number of processes" if name == "processes" else option(name)


def _listed(literal: Any) -> str:
    return ", ".join(get_args(literal))
