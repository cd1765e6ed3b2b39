"""Ways to train part of a model: eager freezing, blocks compiled by `torch.compile` alone, and gtcompile."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gtcompile.capture.model_io import loss_of
from gtcompile.compiler.blocks import find_blocks
from gtcompile.torch_internals import dynamo_config, dynamo_counters

Trained = frozenset[str]


class Subject(Protocol):
    """What candidates train. Each candidate gets its own model."""

    def model(self) -> nn.Module:
        """A new model for one candidate."""

    def batch(self) -> Mapping[str, Any]:
        """The batch of every step, labels included."""


class Candidate:
    """One way to train part of a model.

    Args:
        subject: what to train.
        prepare: compiles the model and returns the module to call.
        choose: trains exactly the given parameters from the next step on; None trains everything.
        recompile_limit: Dynamo's limit while this candidate runs; None leaves the default.
    """

    def __init__(
        self,
        subject: Subject,
        prepare: Callable[[nn.Module], nn.Module],
        choose: Callable[[nn.Module, Trained | None], object],
        recompile_limit: int | None = None,
    ) -> None:
        self._model = subject.model()
        self._batch = subject.batch()
        self._run = prepare(self._model)
        self._choose = choose
        self._limit = recompile_limit
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, fused=True)

    @property
    def model(self) -> nn.Module:
        """The original model; its blocks may be compiled."""
        return self._model

    @property
    def callable(self) -> nn.Module:
        """The module that a step calls; it has the same parameters."""
        return self._run

    @property
    def batch(self) -> Mapping[str, Any]:
        """The batch of every step."""
        return self._batch

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of every step."""
        return self._optimizer

    def switch(self, trained: Trained | None) -> None:
        """Train exactly these parameters from the next step on."""
        self._choose(self._model, trained)

    def loss(self) -> torch.Tensor:
        """The forward pass of a step."""
        with self._limits():
            return loss_of(self._run(**self._batch))

    def step(self) -> None:
        """One training step: forward, backward, AdamW."""
        with self._limits():
            loss_of(self._run(**self._batch)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def switch_and_step(self, trained: Trained | None) -> None:
        """The first step with another trained set."""
        self.switch(trained)
        self.step()

    def forget_moments(self) -> None:
        """Drop the optimizer's state; the next step creates it again for the trained parameters."""
        self._optimizer.state.clear()

    @contextlib.contextmanager
    def _limits(self) -> Iterator[None]:
        if self._limit is None:
            yield
            return
        with dynamo_config.patch(recompile_limit=self._limit, accumulated_recompile_limit=self._limit):
            yield


def eager(subject: Subject) -> Candidate:
    """Eager PyTorch with `requires_grad_`."""
    return Candidate(subject, lambda model: model, freeze)


def plain_blocks(subject: Subject, recompile_limit: int | None = None) -> Candidate:
    """Every block compiled by `torch.compile`, with `requires_grad_`."""
    return Candidate(subject, _compile_each_block, freeze, recompile_limit)


def freeze(model: nn.Module, trained: Trained | None) -> None:
    """Set `requires_grad` to true for exactly these parameters; None means all of them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
        parameter.grad = None


def _compile_each_block(model: nn.Module) -> nn.Module:
    for name in find_blocks(model):
        model.get_submodule(name).compile()
    return model


@dataclass(frozen=True, slots=True)
class Compilations:
    """The work that `torch.compile` did in this process."""

    captures: int
    """Graphs that Dynamo captured."""
    compiled: int
    """Graphs that Inductor compiled or took from its cache."""

    def __sub__(self, earlier: "Compilations") -> "Compilations":
        """The work since an earlier count."""
        return Compilations(self.captures - earlier.captures, self.compiled - earlier.compiled)


def compilations() -> Compilations:
    """Count the work of `torch.compile` in this process so far."""
    inductor = dynamo_counters["inductor"]
    outcomes = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    compiled = sum(inductor[outcome] for outcome in outcomes)
    return Compilations(dynamo_counters["stats"]["unique_graphs"], compiled)
