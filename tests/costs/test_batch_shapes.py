"""FLOPs at one shape of batches as they follow from those at others."""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gtcompile.costs.batch_shapes import batch_shapes, combination


def text(rows, length, count=None):
    ids = torch.zeros(rows, length, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    return batch_shapes(batch if count is None else {**batch, "positions": torch.zeros(count)})


def pairs(rows, source, target):
    return batch_shapes({"input_ids": torch.zeros(rows, source), "labels": torch.zeros(rows, target)})


def derived(known, wanted, flops):
    """FLOPs at the wanted sizes from those at the known ones; None if these do not determine them."""
    factors = combination(known, wanted)
    if factors is None:
        return None
    return sum((factor * flops(shape.sizes) for shape, factor in factors.items()), Fraction(0))


SIZES = st.integers(1, 40)
FACTORS = st.lists(st.integers(0, 10**12), min_size=8, max_size=8)


@given(lengths=st.lists(SIZES, min_size=4, max_size=4, unique=True), factors=FACTORS)
def test_three_lengths_determine_every_other(lengths, factors):
    def flops(sizes):
        rows, length = sizes[:2]
        return rows * (factors[0] * length + factors[1] * length**2) + factors[2]

    *known, wanted = (text(4, length) for length in lengths)
    assert derived(known, wanted, flops) == flops(wanted.sizes)
    assert derived(known[:2], wanted, flops) is None


@given(shapes=st.lists(st.tuples(SIZES, SIZES, SIZES), min_size=2, max_size=14), factors=FACTORS)
def test_what_is_derived_for_rows_lengths_and_labelled_positions_is_exact(shapes, factors):
    def flops(sizes):
        rows, length, positions = sizes[0], sizes[1], sizes[-1]
        attention = rows * (factors[0] + factors[1] * length + factors[2] * length**2)
        return attention + factors[3] * positions + factors[4] * length + factors[5]

    *known, wanted = dict.fromkeys(text(*each) for each in shapes)
    assume(known)
    assert derived(known, wanted, flops) in (None, flops(wanted.sizes))


@given(shapes=st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=9), factors=FACTORS)
def test_encoder_decoders_have_two_lengths_that_are_multiplied(shapes, factors):
    def flops(sizes):
        rows, source, _, target = sizes
        own = factors[0] * source**2 + factors[1] * target**2 + factors[2] * target
        return rows * (own + factors[3] * source * target) + factors[4]

    *known, wanted = dict.fromkeys(pairs(2, *each) for each in shapes)
    assume(known)
    assert derived(known, wanted, flops) in (None, flops(wanted.sizes))


def test_a_size_that_varies_for_the_first_time_is_not_derived():
    assert combination([text(4, 8), text(4, 9), text(4, 10)], text(3, 12)) is None
    assert combination([text(4, 8, 16), text(4, 9, 16), text(4, 10, 16)], text(4, 12, 32)) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3, dtype=torch.int64)}),
        ({"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3, 1)}),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        ({"a": torch.zeros(2), "train": True}, {"a": torch.zeros(2), "train": False}),
        ({"a": None}, {"a": 3}),
    ],
)
def test_other_dtypes_names_and_values_make_another_kind_of_batch(one, other):
    assert batch_shapes(one).kind != batch_shapes(other).kind


def test_whole_numbers_are_sizes():
    one, other = (batch_shapes({"max_length": n, "ids": torch.zeros(1, 7)}) for n in (3, 4))
    assert one.kind == other.kind
    assert one.sizes == (3, 1, 7)
