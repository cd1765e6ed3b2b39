"""Shapes of batches, and how the FLOPs at one shape follow from those at others.

The FLOPs of an operator are a product of sizes: of a matrix product rows x length x width x width, of
attention rows x length x length x width. So as long as an operator's sizes are proportional to the batch's,
or fixed, a step's FLOPs are a polynomial in the sizes of the batch: linear in its rows, quadratic in its
lengths. Then the FLOPs at a new shape are a fixed combination of those at a few known shapes, whatever the
coefficients: three lengths are enough where only the length varies.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement
from math import prod
from typing import Any, Literal

import torch
from sympy import Matrix, Rational

Role = Literal["rows", "length", "count"]
"""What a size is: the first of a tensor with two or more, another of them, or a single one: the only one of a
tensor, or a whole number in the batch."""


@dataclass(frozen=True, slots=True)
class BatchShapes:
    """What the FLOPs of a step on a batch depend on, unless the model branches on data."""

    kind: Hashable
    """The structure of the batch, dtypes and numbers of dimensions of its tensors, and every other value."""
    roles: tuple[Role, ...]
    """What each size is; equal for batches of one kind."""
    sizes: tuple[int, ...]
    """The sizes of all tensors, and the whole numbers, in order."""


def batch_shapes(batch: Any) -> BatchShapes:
    """Return the shapes of a batch of any structure.

    >>> batch_shapes({"input_ids": torch.zeros(4, 20), "weights": torch.zeros(4)}).sizes
    (4, 20, 4)
    """
    found: list[tuple[Role, int]] = []
    kind = _kind_of(batch, found)
    return BatchShapes(kind, tuple(role for role, _ in found), tuple(size for _, size in found))


def combination(known: Sequence[BatchShapes], wanted: BatchShapes) -> dict[BatchShapes, Fraction] | None:
    """Return by which factors to add the FLOPs at known shapes to get those at another shape.

    This holds for every polynomial of the degrees above, with any coefficients.

    Args:
        known: shapes, all of the same kind.
        wanted: another shape of this kind.

    Returns:
        The factors that are not zero; None if the known shapes do not determine the polynomial there.

    >>> at = [batch_shapes(torch.zeros(1, length)) for length in (1, 2, 3, 4)]
    >>> [str(factor) for factor in combination(at[:3], at[3]).values()]
    ['1', '-3', '3']
    """
    monomials = [tuple(_monomials(shape, [*known, wanted])) for shape in (*known, wanted)]
    columns, target = Matrix(monomials[:-1]).T, Matrix(monomials[-1])
    try:
        solution, free = columns.gauss_jordan_solve(target)
    except ValueError:  # no solution
        return None
    factors = [Rational(value) for value in solution.subs(dict.fromkeys(free, 0))]
    return {
        shape: Fraction(int(factor.p), int(factor.q))
        for shape, factor in zip(known, factors, strict=True)
        if factor
    }


def _kind_of(value: Any, found: list[tuple[Role, int]]) -> Hashable:
    """Return the kind of a batch, and append the role of every size with the size to `found`."""
    if isinstance(value, torch.Tensor):
        first: Role = "rows" if value.dim() > 1 else "count"
        found += [("length" if index else first, size) for index, size in enumerate(value.shape)]
        return value.dtype, value.dim()
    if isinstance(value, Mapping):
        return tuple((key, _kind_of(item, found)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_kind_of(item, found) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        found.append(("count", value))
        return int
    return repr(value)


def _monomials(shape: BatchShapes, among: Sequence[BatchShapes]) -> Iterator[int]:
    """The monomials at a shape, of the sizes that vary among these shapes, each distinct size once."""
    rows, lengths, counts = _distinct_sizes(shape, among)
    quadratic = [prod(chosen) for chosen in combinations_with_replacement((1, *lengths), 2)]
    for factor in (1, *rows):
        yield from (factor * value for value in quadratic)
    yield from counts


def _distinct_sizes(shape: BatchShapes, among: Sequence[BatchShapes]) -> tuple[list[int], ...]:
    """The sizes of a shape by role, without those that are constant or equal another one in all shapes."""
    seen: set[tuple[int, ...]] = set()
    sizes: dict[Role, list[int]] = {"rows": [], "length": [], "count": []}
    for role, into in sizes.items():
        for index, size in enumerate(shape.sizes):
            column = tuple(other.sizes[index] for other in among)
            if shape.roles[index] == role and len(set(column)) > 1 and column not in seen:
                seen.add(column)
                into.append(size)
    return tuple(sizes.values())
