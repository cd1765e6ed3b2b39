"""Options of the callbacks for trainers, the progress of one training, and what both callbacks report."""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from gtcompile.capture.model_io import LossFunction
from gtcompile.compiler.options import parse_options
from gtcompile.costs.budgets import BudgetOf, resolved_budget
from gtcompile.errors import GTCompileError
from gtcompile.graph.names import near_names, refuse_string
from gtcompile.selection import policies
from gtcompile.selection.limits import make_terms
from gtcompile.selection.selection import Selection
from gtcompile.state.optimizer_state import Setting, check_setting
from gtcompile.training.adaptive import AdaptiveBackprop

logger = logging.getLogger(__name__)

Every = int | Literal["epoch"]
"""When a new set is selected: at each "epoch", a pass over the data, or after this many optimizer steps."""

Policy = str | policies.Policy | policies.Choose
"""A selection policy: a name, a description from `gtcompile.policies`, or a user's function."""

MAY_CHANGE = frozenset({"compiled", "compiler", "activation_memory_budget", "prefix_cache"})
"""Options that a resumed training may set differently: they do not change what is trained."""


P = ParamSpec("P")
Owner = TypeVar("Owner")


def takes(
    options: Callable[P, object],
) -> Callable[[Callable[Concatenate[Owner, ...], None]], Callable[Concatenate[Owner, P], None]]:
    """Make a constructor with `**options` show, in its signature, the fields of these options by name.

    An argument that is no such field is a TypeError with the nearest names.

    Args:
        options: the class of options to which the constructor hands its arguments.
    """
    shown = inspect.signature(options)

    def decorate(construct: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(construct)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for name in kwargs:
                if name not in shown.parameters:
                    near = near_names(name, shown.parameters)
                    raise TypeError(f"{type(self).__name__} has no option {name!r}; {near}")
            construct(self, *args, **kwargs)

        own = next(iter(inspect.signature(construct).parameters.values()))
        signature = shown.replace(parameters=[own, *shown.parameters.values()], return_annotation=None)
        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked

    return decorate


@dataclass(frozen=True, slots=True)
class CallbackOptions:
    """The arguments of an `AdaptiveBackpropCallback`, checked.

    Raises:
        ValueError: for a value out of range.
        TypeError: for a value of the wrong type.
    """

    budget_fraction: float | None = None
    """Share of FLOPs that a step may take, in (0, 1]; `budget_of` says of which. None becomes 0.5, or 1.0 if
    there is another budget."""
    _: KW_ONLY
    budget_seconds: float | None = None
    """Seconds that a step may take; None for no limit."""
    budget_memory: int | None = None
    """Bytes that training may take beside the weights; None for no limit."""
    budget_of: BudgetOf = "step"
    """What the budget is a share of: "step" or "full_finetuning"."""
    policy: Policy = "best"
    """How the set is selected."""
    every: Every = "epoch"
    """When to select a new set: each "epoch", or after this many optimizer steps."""
    batches: int = 4
    """Number of batches that importance is measured on."""
    compiled: bool = True
    """Whether the model's repeated blocks are compiled."""
    compiler: str = "inductor"
    """Compiler of their graphs: "inductor" or "eager"."""
    always: tuple[str, ...] = ()
    """Patterns of parameters that are always trained."""
    never: tuple[str, ...] = ()
    """Patterns of parameters that are never trained."""
    two_pass: bool = False
    """Whether importance is measured within each batch, as the paper does."""
    frozen_state: Setting = "keep"
    """Where a frozen parameter's optimizer state goes: "keep", "cpu" or "drop"."""
    activation_memory_budget: float = 1.0
    """Share of the bytes saved for backward that may be kept, in [0, 1]; the rest is recomputed."""
    prefix_cache: bool | str | Path = False
    """Whether the frozen blocks near the input are computed once per example; a folder keeps their outputs on
    disk as well."""
    labelled_logits: bool = False
    """Whether the head and the loss are computed at labelled positions alone."""

    def __post_init__(self) -> None:
        given = self.budget_fraction, self.budget_seconds, self.budget_memory
        share = resolved_budget(*given, default=0.5)
        object.__setattr__(self, "budget_fraction", share)
        terms = make_terms(
            share,
            (),
            (),
            self.budget_of,
            budget_seconds=self.budget_seconds,
            budget_memory=self.budget_memory,
        )
        policies.check_holds(policies.find_policy(self.policy), terms)
        if self.every != "epoch" and not _is_count(self.every, 1):
            raise ValueError(f'expected every="epoch" or a number of steps of at least 1, got {self.every!r}')
        for name in ("compiled", "two_pass", "labelled_logits"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"expected {name}=True or False, got {getattr(self, name)!r}")
        if not _is_count(self.batches, 1 if self.two_pass else 2):
            raise ValueError(f"expected at least 2 batches, or 1 with two_pass=True, got {self.batches!r}")
        if not isinstance(self.prefix_cache, bool | str | Path):
            raise TypeError(f"expected prefix_cache=True, False or a folder, got {self.prefix_cache!r}")
        parse_options(self.compile_options)
        check_setting(self.frozen_state)
        for name in ("always", "never"):
            object.__setattr__(self, name, _patterns(getattr(self, name)))

    @property
    def compile_options(self) -> dict[str, Any]:
        """The options of `compile_blocks`."""
        return {"compiler": self.compiler, "activation_memory_budget": self.activation_memory_budget}

    def make_adaptive(
        self, model: nn.Module, optimizer: Optimizer, *, steps: int | None, seed: int, loss_fn: LossFunction
    ) -> AdaptiveBackprop:
        """What selects within the budget, for one training.

        Args:
            model: as the training loop calls it.
            optimizer: of its parameters.
            steps: optimizer steps of the whole training; None if it has no end.
            seed: of policies that draw at random.
            loss_fn: the loss of a batch, as the trainer computes it.

        Raises:
            ValueError: the policy must know the number of steps, and there is none.
        """
        return AdaptiveBackprop(
            model,
            optimizer,
            self.budget_fraction,
            budget_seconds=self.budget_seconds,
            budget_memory=self.budget_memory,
            budget_of=self.budget_of,
            policy=policies.for_training(policies.find_policy(self.policy), steps),
            seed=seed,
            always=self.always,
            never=self.never,
            two_pass=self.two_pass,
            frozen_state=self.frozen_state,
            loss_fn=loss_fn,
            prefix_cache=self.prefix_cache,
        )

    def to_json(self) -> dict[str, Any]:
        """The options as JSON types.

        A policy that is no name is written as text, which the constructor refuses: a checkpoint cannot
        restore a function.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        patterns = {"always": list(self.always), "never": list(self.never)}
        cache = self.prefix_cache if isinstance(self.prefix_cache, bool) else str(self.prefix_cache)
        return {**values, **patterns, "policy": policy_name(self.policy), "prefix_cache": cache}

    def check_resumed(self, saved: Mapping[str, Any]) -> None:
        """Refuse to continue a training that was started with other options.

        Args:
            saved: what `to_json` returned then.

        Raises:
            ValueError: names the first option that differs, with both values.
        """
        for name, value in self.to_json().items():
            before = saved.get(name)
            if name not in MAY_CHANGE and before != value:
                raise ValueError(
                    f"the checkpoint was trained with {name}={before!r}, this callback has {value!r}; "
                    f"resume with the checkpoint's, or start a new training"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far one training has come."""

    steps: int = 0
    """Optimizer steps taken."""
    spent: float = 0.0
    """Sum over those steps of the share that each took of the FLOPs that `budget_of` names."""
    selected_at: int = -1
    """The trainer's step before which the present set was selected; -1 before the first selection."""
    due: bool = True
    """Whether the next step selects a new set, independent of `every`."""
    mid_epoch: bool = False
    """Whether the training was resumed inside an epoch: the next epoch event then starts no new epoch."""

    def after_step(self, fraction: float) -> Self:
        """Return the progress after a step that took this share of FLOPs."""
        return dataclasses.replace(self, steps=self.steps + 1, spent=self.spent + fraction)

    @property
    def mean_fraction(self) -> float | None:
        """Mean share of FLOPs over the steps so far; None before the first step."""
        return self.spent / self.steps if self.steps else None

    @property
    def spent_numbers(self) -> dict[str, float]:
        """The mean share of FLOPs, to be logged; empty before the first step."""
        return {} if self.mean_fraction is None else {"adaptive/flops_fraction_spent": self.mean_fraction}


def selection_numbers(selection: Selection) -> dict[str, float]:
    """The numbers that are logged for a selection."""
    return {
        "adaptive/trained_parameters": len(selection.trained),
        "adaptive/selectable_parameters": selection.selectable,
        "adaptive/flops_fraction": selection.step_fraction,
        "adaptive/importance": selection.importance,
        **selection.further_numbers,
    }


def used_by_another_training(callback: object) -> GTCompileError:
    """The error for a callback that two trainers share."""
    return GTCompileError(
        f"another training uses this {type(callback).__name__} by now; give each trainer its own"
    )


def warn_of_other_torch(saved: str) -> None:
    """Warn if a checkpoint that is continued was written with this other version of torch."""
    if saved != torch.__version__:
        logger.warning(
            "resumed with torch %s, saved with %s: the continuation may differ in rounding",
            *(torch.__version__, saved),
        )


def policy_name(policy: Policy) -> str:
    """The text that stands for a policy in checkpoints.

    >>> policy_name("best"), policy_name(len)
    ('best', 'builtins.len')
    """
    if isinstance(policy, str):
        return policy
    return f"{policy.__module__}.{policy.__qualname__}" if inspect.isroutine(policy) else repr(policy)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _patterns(given: Any) -> tuple[str, ...]:
    refuse_string(given)
    patterns = tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"expected FQNs or shell-style patterns, got {pattern!r}")
    return patterns
