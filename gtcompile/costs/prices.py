"""What a training step takes in seconds and bytes, for any set of trained parameters.

Both are sums of the same form as FLOPs: a fixed amount, which every step takes, and amounts that several
parameters share and that are taken once if at least one of them is trained.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gtcompile.graph.names import refuse_string

NANOSECONDS = 10**9
"""Nanoseconds in a second."""


@dataclass(frozen=True, slots=True)
class SharedAmount:
    """An amount that a step takes once if at least one of its parameters is trained."""

    amount: int
    """Nanoseconds or bytes, not negative."""
    parameters: frozenset[str]
    """FQNs whose gradients need it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a step takes of one resource: nanoseconds, or bytes."""

    fixed: int
    """Amount that every step takes."""
    shared: tuple[SharedAmount, ...]
    """Further amounts; small sets of parameters first."""

    def of(self, trained: Iterable[str]) -> int:
        """Return the amount that a step takes if exactly these parameters are trained.

        Args:
            trained: FQNs.

        Raises:
            TypeError: `trained` is a single string.
        """
        refuse_string(trained)
        chosen = frozenset(trained)
        return self.fixed + sum(each.amount for each in self.shared if not each.parameters.isdisjoint(chosen))


def make_price(fixed: int, shared: Iterable[SharedAmount]) -> Price:
    """Make a price, with one entry for each distinct set of parameters.

    >>> make_price(1, [SharedAmount(2, frozenset("a")), SharedAmount(3, frozenset("a"))])
    Price(fixed=1, shared=(SharedAmount(amount=5, parameters=frozenset({'a'})),))
    """
    amounts: dict[frozenset[str], int] = {}
    for each in shared:
        amounts[each.parameters] = amounts.get(each.parameters, 0) + each.amount
    merged = [SharedAmount(amount, names) for names, amount in amounts.items() if amount and names]
    merged.sort(key=lambda each: (len(each.parameters), sorted(each.parameters)))
    return Price(fixed=fixed, shared=tuple(merged))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrices:
    """What a training step takes in seconds and bytes, at the shapes of one batch; each may be unknown."""

    nanoseconds: Price | None = None
    """Of forward, backward and optimizer step; None if it was not measured."""
    memory: Price | None = None
    """Bytes beside the weights: saved for backward, gradients, optimizer state, prefix cache; None if they
    were not computed."""

    def step_seconds(self, trained: Iterable[str]) -> float:
        """Return the seconds of a step if exactly these parameters are trained.

        Args:
            trained: FQNs.

        Raises:
            ValueError: the seconds of a step were not measured.
        """
        if self.nanoseconds is None:
            raise ValueError("these prices know no seconds; call step_prices(..., seconds=True)")
        return self.nanoseconds.of(trained) / NANOSECONDS

    def step_bytes(self, trained: Iterable[str]) -> int:
        """Return the bytes that training takes beside the weights if exactly these parameters are trained.

        Args:
            trained: FQNs.

        Raises:
            ValueError: the bytes of a step were not computed.
        """
        if self.memory is None:
            raise ValueError("these prices know no bytes; call step_prices(..., memory=True)")
        return self.memory.of(trained)
