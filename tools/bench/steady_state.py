"""Ordinary steps of every candidate at several budgets, timed in turns."""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from gtcompile.selection.selection import Selection
from gtcompile.tools.bench.baselines import Candidate
from gtcompile.tools.bench.measurement import Timed, alternate

STEPS_PER_TURN = 3
"""The fastest of so many steps counts: other work on the machine only ever adds time."""
HOISTED, EAGER, PLAIN = "hoisted blocks", "eager freezing", "plain blocks"
"""Names of gtcompile and of the two baselines."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate with one trained set."""

    candidate: str
    """Name of the candidate."""
    budget: float
    """Share of a full step's FLOPs that the set was chosen for; 1.0 trains everything."""


@dataclass(frozen=True, slots=True)
class SteadyState:
    """The candidates on one subject, each with the trained sets it is measured with."""

    candidates: Mapping[str, Candidate]
    """Candidates by name."""
    selections: Mapping[float, Selection]
    """The selection of each budget."""
    full_only: Collection[str] = ()
    """Names of candidates that compile for every set; they are measured only with everything trained."""

    @property
    def trials(self) -> list[Trial]:
        """All measurements: everything trained first, then budget by budget."""
        switching = [name for name in self.candidates if name not in self.full_only]
        budgets = [Trial(name, budget) for budget in self.selections for name in switching]
        return [Trial(name, 1.0) for name in self.candidates] + budgets

    def prepare(self, budget: float, *names: str) -> None:
        """Let some candidates train a budget's set for a step, so that their next step is an ordinary one.

        The other candidates drop their optimizer state, since a user would have one model in memory.
        """
        for name, candidate in self.candidates.items():
            if name not in names:
                candidate.forget_moments()
        trained = None if budget == 1.0 else self.selections[budget].trained
        for name in names:
            self.candidates[name].switch_and_step(trained)

    def timed(self, trial: Trial) -> Timed:
        """The trial's step, to be timed in turns with others."""
        prepare = functools.partial(self.prepare, trial.budget, trial.candidate)
        return Timed(prepare, self.candidates[trial.candidate].step)


def time_steps(steady: SteadyState, rounds: int, device: torch.device) -> dict[Trial, list[float]]:
    """Seconds of an ordinary step of every trial in each round, the trials taking turns."""
    steps = {trial: steady.timed(trial) for trial in steady.trials}
    return alternate(steps, rounds, device, STEPS_PER_TURN)
