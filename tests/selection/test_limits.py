"""Budgets in seconds and bytes beside FLOPs: against exhaustive search, and what is refused."""

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gtcompile import BudgetError, StepPrices, select_parameters
from gtcompile.costs.budgets import budget_flops
from gtcompile.costs.prices import NANOSECONDS, SharedAmount, make_price
from gtcompile.selection.selection import parameters_to_measure
from tests.selection.test_selection import CHAIN, IMPORTANCE, coverage_costs

AMOUNTS = st.one_of(st.integers(0, 20), st.integers(0, 10**12), st.integers(10**14, 10**14 + 9))


@st.composite
def prices_over(draw, names):
    """A price whose amounts are shared by other sets of parameters than the FLOPs are."""
    sets = st.frozensets(st.sampled_from(names), min_size=1)
    prefixes = st.integers(1, len(names)).map(lambda length: frozenset(names[:length]))
    amounts = draw(st.sampled_from([AMOUNTS, st.integers(0, 20)]))
    shared = st.builds(SharedAmount, amounts, st.one_of(sets, prefixes))
    return make_price(draw(amounts), draw(st.lists(shared, max_size=12)))


@st.composite
def questions(draw, most=7):
    """Costs, importances, prices, and two or three budgets that train something together."""
    costs = draw(coverage_costs(most=most))
    names = sorted(costs.fqns)
    importance = {name: draw(IMPORTANCE) for name in names}
    prices = StepPrices(nanoseconds=draw(prices_over(names)), memory=draw(prices_over(names)))
    always = draw(st.lists(st.sampled_from(names), max_size=1))
    never = [name for name in draw(st.lists(st.sampled_from(names), max_size=2)) if name not in always]
    assume(len(set(never)) < len(names))
    budgets = {
        "budget_fraction": draw(st.one_of(st.none(), st.floats(0.3, 1.0))),
        "budget_seconds": draw(st.one_of(st.none(), budget_between(prices.nanoseconds, names, NANOSECONDS))),
        "budget_memory": draw(budget_between(prices.memory, names, None)),
    }
    return costs, importance, {**budgets, "prices": prices, "always": always, "never": never}


def budget_between(price, names, unit):
    """A budget somewhere between nothing and everything."""
    amounts = st.integers(1, max(price.of(names), 1))
    return amounts.map(lambda amount: amount / unit) if unit else amounts


def select_with_minimum(costs, importance, given):
    """Select; raise each budget that is too small to what its error names."""
    for _ in range(4):
        try:
            return select_parameters(costs, importance, **given), given
        except BudgetError as error:
            named = {
                "budget_fraction": error.minimum_budget_fraction,
                "budget_seconds": error.minimum_budget_seconds,
                "budget_memory": error.minimum_budget_memory,
            }
            too_small = {name: value for name, value in named.items() if value is not None}
            assert len(too_small) == 1
            assert given[next(iter(too_small))] < next(iter(too_small.values()))
            given = {**given, **too_small}
    pytest.fail("the smallest budgets named do not work")


def fits(costs, prices, given, trained):
    seconds, memory = given["budget_seconds"], given["budget_memory"]
    share = given["budget_fraction"] or 1.0
    return (
        costs.step_flops(trained) <= budget_flops(costs.full_flops, share)
        and (seconds is None or prices.step_seconds(trained) <= seconds)
        and (memory is None or prices.step_bytes(trained) <= memory)
    )


@settings(max_examples=200, deadline=None)
@given(questions())
def test_several_budgets_are_used_as_well_as_exhaustive_search_finds(question):
    costs, importance, asked = question
    selection, given_now = select_with_minimum(costs, importance, asked)
    prices = given_now["prices"]
    assert fits(costs, prices, given_now, selection.trained)
    assert selection.step_bytes == prices.step_bytes(selection.trained)
    undecided = parameters_to_measure(costs, **given_now)
    assume(any(importance[name] for name in undecided))
    always, never = set(given_now["always"]), set(given_now["never"])
    everything = costs.fqns
    if not never and fits(costs, prices, given_now, everything):
        assert selection.trained == everything
        return
    optional = sorted(name for name in everything - always - never if importance[name] >= 0)
    candidates = (
        frozenset(chosen) | always
        for size in range(len(optional) + 1)
        for chosen in itertools.combinations(optional, size)
    )
    best = max(
        math.fsum(importance[name] for name in trained)
        for trained in candidates
        if fits(costs, prices, given_now, trained)
    )
    scale = math.fsum(abs(value) for value in importance.values())
    assert selection.importance == pytest.approx(best, abs=1e-6 * scale)
    assert selection.importance_bound == selection.importance


PRICES = StepPrices(
    nanoseconds=make_price(
        5 * 10**8, [SharedAmount(10**8, frozenset("a")), SharedAmount(3 * 10**8, frozenset("bc"))]
    ),
    memory=make_price(
        100,
        [
            SharedAmount(50, frozenset("a")),
            SharedAmount(10, frozenset("b")),
            SharedAmount(30, frozenset("c")),
        ],
    ),
)
GAINS = {"a": 1.0, "b": 1.0, "c": 1.5}


def test_seconds_alone_limit_nothing_else():
    selection = select_parameters(CHAIN, GAINS, budget_seconds=0.8, prices=PRICES)
    assert selection.trained == {"b", "c"}
    assert (selection.step_seconds, selection.budget_seconds) == (0.8, 0.8)
    assert (selection.step_bytes, selection.budget_memory) == (None, None)
    assert selection.budget_flops == CHAIN.full_flops
    assert "0.8 s (budget 0.8 s)" in str(selection)


def test_bytes_alone_limit_nothing_else():
    selection = select_parameters(CHAIN, GAINS, budget_memory=145, prices=PRICES)
    assert selection.trained == {"b", "c"}
    assert (selection.step_bytes, selection.budget_memory) == (140, 145)
    assert "0.0 MB (budget 0.0 MB)" in str(selection)


@pytest.mark.parametrize("memory", [135, 130])
def test_every_budget_holds_when_several_are_given(memory):
    selection = select_parameters(CHAIN, GAINS, 0.9, budget_seconds=0.85, budget_memory=memory, prices=PRICES)
    assert selection.trained == {"c"}
    assert (selection.step_flops, selection.budget_flops) == (30, 54)
    assert (selection.step_seconds, selection.step_bytes) == (0.8, 130)


def test_a_budget_that_trains_nothing_names_the_smallest_that_does():
    with pytest.raises(BudgetError, match=r"budget_seconds 0.55 is too small: .* 0.6 seconds") as caught:
        select_parameters(CHAIN, GAINS, budget_seconds=0.55, prices=PRICES)
    assert caught.value.minimum_budget_seconds == 0.6
    assert caught.value.minimum_budget_fraction is None
    with pytest.raises(BudgetError, match=r"budget_memory 109 is too small: .* 110 bytes") as caught:
        select_parameters(CHAIN, GAINS, budget_memory=109, prices=PRICES)
    assert caught.value.minimum_budget_memory == 110
    with pytest.raises(BudgetError, match=r"trains 'c', as always requires, takes at least 130 bytes"):
        select_parameters(CHAIN, GAINS, budget_memory=129, prices=PRICES, always=["c"])


def test_budgets_that_exclude_one_another_are_refused_together():
    with pytest.raises(BudgetError, match=r"together with the other budgets, .*") as caught:
        select_parameters(CHAIN, GAINS, budget_seconds=0.7, budget_memory=120, prices=PRICES)
    assert caught.value.minimum_budget_seconds == 0.8
    select_parameters(CHAIN, GAINS, budget_seconds=0.8, budget_memory=120, prices=PRICES)


@pytest.mark.parametrize("name", ["budget_seconds", "budget_memory"])
def test_a_budget_without_its_prices_says_where_they_come_from(name):
    for prices in (None, StepPrices()):
        with pytest.raises(ValueError, match=rf"{name} needs to know .*step_prices"):
            select_parameters(CHAIN, GAINS, prices=prices, **{name: 1})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, TypeError),
        ({"budget_seconds": 0}, ValueError),
        ({"budget_seconds": -1.0}, ValueError),
        ({"budget_seconds": math.inf}, ValueError),
        ({"budget_seconds": math.nan}, ValueError),
        ({"budget_seconds": "1 s"}, TypeError),
        ({"budget_seconds": True}, TypeError),
        ({"budget_memory": 0}, ValueError),
        ({"budget_memory": -5}, ValueError),
        ({"budget_memory": 1.5e9}, TypeError),
        ({"budget_memory": "8GB"}, TypeError),
        ({"budget_memory": True}, TypeError),
    ],
)
def test_a_budget_in_wrong_units_is_refused(given, error):
    with pytest.raises(error, match=r"expected a? ?budget"):
        select_parameters(CHAIN, GAINS, prices=PRICES, **given)


def test_prices_that_were_not_taken_are_not_zero():
    with pytest.raises(ValueError, match="no seconds"):
        StepPrices().step_seconds(["a"])
    with pytest.raises(ValueError, match="no bytes"):
        StepPrices().step_bytes(["a"])
