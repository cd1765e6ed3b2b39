"""The selection against exhaustive search, and what it promises at sizes no search reaches."""

import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gtcompile import BackwardCosts, BudgetError, GTCompileError, select_parameters
from gtcompile.costs.backward_costs import SharedWork
from gtcompile.costs.budgets import budget_flops, written_budget
from gtcompile.graph.joint_graph import Parameter
from gtcompile.selection import knapsack
from gtcompile.selection.knapsack import Capacity, inclusion_pairs, solve_knapsack
from gtcompile.selection.selection import parameters_to_measure

FLOPS = st.one_of(st.just(0), st.integers(1, 50), st.integers(1, 10**15), st.integers(10**14, 10**14 + 9))
IMPORTANCE = st.one_of(st.just(0.0), st.integers(-3, 9).map(float), st.floats(-1.0, 5.0, width=32))


def costs_from(works, forward_flops=0, names=None, aliases=None):
    """Costs from pairs (FLOPs, names that need them); parameters sorted, unless `names` lists them."""
    names = names or sorted({name for _, needed_by in works for name in needed_by})
    parameters = tuple(
        Parameter(fqn=name, aliases=(aliases or {}).get(name, ()), shape=(2,), dtype=torch.float32)
        for name in names
    )
    shared = tuple(SharedWork(flops, frozenset(needed_by)) for flops, needed_by in works)
    return BackwardCosts(parameters=parameters, forward_flops=forward_flops, shared_work=shared)


@st.composite
def coverage_costs(draw, fewest=1, most=9):
    """Random works over so many parameters: chains, branches, and sets that merely overlap."""
    names = [f"p{index}" for index in range(draw(st.integers(fewest, most)))]
    flops_of = draw(st.sampled_from([FLOPS, st.integers(0, 20)]))
    sets = st.frozensets(st.sampled_from(names), min_size=1)
    prefixes = st.integers(1, len(names)).map(lambda length: frozenset(names[:length]))
    works = draw(st.lists(st.tuples(flops_of, st.one_of(sets, prefixes)), min_size=1, max_size=2 * most))
    return costs_from(works, forward_flops=draw(flops_of), names=names)


@st.composite
def questions(draw, fewest=1, most=9):
    """Costs, importances, a budget that suffices, and disjoint `always` and `never`."""
    costs = draw(coverage_costs(fewest, most))
    names = sorted(costs.fqns)
    importance = {name: draw(IMPORTANCE) for name in names}
    role = {name: draw(st.sampled_from(["open"] * 6 + ["always", "never"])) for name in names}
    role[names[0]] = role[names[0]].replace("never", "open")
    always, never = ([name for name in names if role[name] == kind] for kind in ("always", "never"))
    budget = draw(st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0])))
    try:
        parameters_to_measure(costs, budget, always=always, never=never)
    except BudgetError as error:
        budget = error.minimum_budget_fraction
    return costs, importance, budget, always, never


def select(costs, importance, budget, always, never):
    return select_parameters(costs, importance, budget, always=always, never=never)


def best_importance(costs, importance, budget, always, never):
    """Exhaustive search; None when no set fits."""
    everything = costs.fqns
    limit = budget_flops(costs.full_flops, budget)
    if not never and costs.full_flops <= limit:
        return math.fsum(importance.values())
    optional = sorted(everything - set(always) - set(never))
    candidates = (
        frozenset(chosen) | frozenset(always)
        for size in range(len(optional) + 1)
        for chosen in itertools.combinations(optional, size)
        if all(importance[name] >= 0 for name in chosen)
    )
    fitting = [trained for trained in candidates if costs.step_flops(trained) <= limit]
    return max((math.fsum(importance[name] for name in trained) for trained in fitting), default=None)


def scale_of(importance):
    return math.fsum(abs(value) for value in importance.values())


def is_all_zero(costs, importance, budget, always, never):
    return not any(importance[n] for n in parameters_to_measure(costs, budget, always=always, never=never))


@settings(max_examples=250, deadline=None)
@given(questions())
def test_the_selection_is_as_good_as_exhaustive_search_finds(question):
    selection = select(*question)
    assume(not is_all_zero(*question))
    best = best_importance(*question)
    assert best is not None
    assert selection.importance == pytest.approx(best, abs=1e-6 * scale_of(question[1]))
    assert selection.importance_bound == selection.importance


@settings(max_examples=15, deadline=None)
@given(questions(fewest=12, most=12))
def test_twelve_parameters_are_selected_as_well_as_by_exhaustive_search(question):
    selection = select(*question)
    assume(not is_all_zero(*question))
    best = best_importance(*question)
    assert selection.importance == pytest.approx(best, abs=1e-6 * scale_of(question[1]))


@settings(max_examples=200, deadline=None)
@given(questions(most=30))
def test_a_selection_keeps_every_promise_at_any_size(question):
    costs, importance, _, always, never = question
    selection = select(*question)
    assert selection.step_flops == costs.step_flops(selection.trained) <= selection.budget_flops
    assert selection.importance_bound >= selection.importance
    assert selection.trained >= frozenset(always)
    assert selection.trained.isdisjoint(never)
    if selection.trained != costs.fqns:
        assert all(importance[name] >= 0 for name in selection.trained - frozenset(always))


@settings(max_examples=150, deadline=None)
@given(questions(most=20))
def test_what_costs_nothing_more_is_trained(question):
    costs, importance, _, _, never = question
    selection = select(*question)
    for name in costs.fqns - selection.trained - frozenset(never):
        assert importance[name] < 0 or costs.marginal_flops(name, selection.trained) > 0


@settings(max_examples=60, deadline=None)
@given(questions(most=15), st.randoms(use_true_random=False))
def test_the_order_of_parameters_works_and_importances_does_not_matter(question, rng):
    costs, importance, budget, always, never = question
    selection = select(*question)
    works = [(work.flops, work.parameters) for work in costs.shared_work]
    names = [parameter.fqn for parameter in costs.parameters]
    items = list(importance.items())
    for sequence in (works, names, items):
        rng.shuffle(sequence)
    shuffled = costs_from(works, costs.forward_flops, names)
    assert select_parameters(shuffled, dict(items), budget, always=always, never=never) == selection


@settings(max_examples=60, deadline=None)
@given(questions(most=15), st.floats(0.0, 1.0))
def test_a_larger_budget_is_never_worse(question, step):
    costs, importance, budget, always, never = question
    importance = {name: 0.5 + abs(value) for name, value in importance.items()}
    larger = budget + step * (1 - budget)
    small = select(costs, importance, budget, always, never)
    large = select(costs, importance, larger, always, never)
    assert large.importance >= small.importance - 1e-6 * scale_of(importance)


@settings(max_examples=60, deadline=None)
@given(questions())
def test_the_full_budget_trains_everything_whatever_its_importance(question):
    costs, importance, _, always, _ = question
    selection = select_parameters(costs, importance, 1.0, always=always)
    assert selection.trained == costs.fqns
    assert selection.step_flops == selection.budget_flops == costs.full_flops
    assert selection.gap == 0


@settings(max_examples=100, deadline=None)
@given(questions(), st.floats(0.0, 1.0, exclude_max=True))
def test_the_smallest_budget_named_works_when_typed_back_and_no_smaller_one_does(question, share):
    costs, importance, _, always, never = question
    flops = [costs.step_flops({*always, name}) for name in costs.fqns - set(never)]
    minimum_flops = costs.step_flops(always) if always else min(flops)
    assume(minimum_flops)
    with pytest.raises(BudgetError) as caught:
        select(
            costs,
            importance,
            share * (minimum_flops / costs.full_flops) * (1 - 1e-9) or 1e-300,
            always,
            never,
        )
    smallest = float(repr(caught.value.minimum_budget_fraction))
    assert smallest == pytest.approx(minimum_flops / costs.full_flops)
    assert select(costs, importance, smallest, always, never).step_flops >= minimum_flops * bool(always)


@given(coverage_costs())
def test_the_minimum_budget_works_and_the_next_smaller_does_not(costs):
    ones, minimum = dict.fromkeys(costs.fqns, 1.0), costs.minimum_budget_fraction
    assert select_parameters(costs, ones, minimum).trained
    typed = float(written_budget(costs.full_flops, costs.cheapest_step_flops))
    assert select_parameters(costs, ones, typed).trained
    if costs.cheapest_step_flops:
        with pytest.raises(BudgetError):
            select_parameters(costs, ones, math.nextafter(minimum, 0.0))


@given(st.integers(0, 10**20), st.integers(1, 10_000))
def test_a_budget_is_the_exact_product_with_the_decimal_as_typed(flops, ten_thousandths):
    typed = float(f"{ten_thousandths / 10_000:.4f}")
    assert budget_flops(flops, typed) == flops * ten_thousandths // 10_000


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**15), st.floats(0.1, 1.0)), min_size=1, max_size=10),
    st.integers(0, 10**15),
)
@example([(10**15, 1.0), *[(1, 0.1)] * 9], 10**15 + 4)
def test_costs_that_doubles_cannot_tell_apart_are_still_counted_exactly(items, budget):
    values = [value for _, value in items]
    taken, gap = solve_knapsack(
        values, [Capacity({1 << i: cost for i, (cost, _) in enumerate(items)}, budget)]
    )
    assert sum(items[index][0] for index in taken) <= budget
    fitting = (
        math.fsum(values[i] for i in chosen)
        for size in range(len(items) + 1)
        for chosen in itertools.combinations(range(len(items)), size)
        if sum(items[i][0] for i in chosen) <= budget
    )
    assert math.fsum(values[i] for i in taken) == pytest.approx(max(fitting), abs=1e-6 * sum(values))
    assert gap == 0.0


def test_a_solver_that_overspends_is_caught_and_the_budget_kept(monkeypatch):
    honest = knapsack._maximise

    def overspend(values, rows, deadline):
        return list(range(len(values))), honest(values, rows, deadline)[1]

    monkeypatch.setattr(knapsack, "_maximise", overspend)
    taken, gap = solve_knapsack([3.0, 2.0, 2.0], [Capacity({0b001: 3, 0b010: 2, 0b100: 2}, 4)])
    assert taken == {0}
    assert gap == pytest.approx(1.0)


def test_a_solver_that_fails_is_reported(monkeypatch):
    class Failure:
        status, message, x = 4, "numerical trouble", None

    monkeypatch.setattr(knapsack, "milp", lambda *_, **__: Failure())
    with pytest.raises(GTCompileError, match="numerical trouble"):
        solve_knapsack([3.0, 2.0], [Capacity({0b01: 3, 0b10: 2}, 4)])


@given(st.lists(st.integers(1, 63), unique=True, max_size=12))
def test_inclusion_pairs_reach_exactly_the_supersets(sets):
    sets.sort(key=lambda items: (items.bit_count(), items))
    reached = {index: {index} for index in range(len(sets))}
    pairs = inclusion_pairs(sets)
    for small, large in reversed(pairs):
        reached[small] |= reached[large]
    for small, large in itertools.product(range(len(sets)), repeat=2):
        assert (large in reached[small]) == (sets[small] & sets[large] == sets[small])
    assert len(pairs) == len(set(pairs))


CHAIN = costs_from([(10, {"a"}), (10, {"b"}), (10, {"c"}), (5, {"a"}), (5, {"a", "b"})], forward_flops=20)


def test_a_chain_trains_the_end_that_the_budget_reaches():
    selection = select_parameters(CHAIN, {"a": 1.0, "b": 1.0, "c": 1.5}, 0.5)
    assert selection.trained == {"c"}
    assert (selection.step_flops, selection.budget_flops, selection.full_flops) == (30, 30, 60)
    assert (selection.importance, selection.importance_bound) == (1.5, 1.5)
    assert str(selection) == (
        "1 of 3 parameters, 50.0% of a full step's FLOPs (budget 50.0%), importance 1.5, proven the best"
    )


def test_importances_that_are_all_zero_count_as_equal():
    selection = select_parameters(CHAIN, dict.fromkeys("abc", 0.0), 0.8)
    assert selection.trained == {"b", "c"}
    assert selection.importance == selection.importance_bound == 2


def test_negative_importance_is_trained_only_on_demand_or_when_everything_fits():
    importance = {"a": -1.0, "b": -1.0, "c": 2.0}
    assert select_parameters(CHAIN, importance, 0.999).trained == {"c"}
    assert select_parameters(CHAIN, importance, 0.999, always=["b"]).trained == {"b", "c"}
    assert select_parameters(CHAIN, importance, 1.0).trained == {"a", "b", "c"}
    assert select_parameters(CHAIN, importance, 1.0, never=["a"]).trained == {"c"}
    assert select_parameters(CHAIN, dict.fromkeys("abc", -1.0), 0.9).trained == frozenset()


def test_the_importance_of_what_no_budgeted_step_can_train_may_be_left_out():
    assert parameters_to_measure(CHAIN, 0.55) == {"c"}
    assert select_parameters(CHAIN, {"c": 1.0}, 0.55).trained == {"c"}
    assert parameters_to_measure(CHAIN, 1.0, always=["a"], never=["b"]) == {"c"}
    with pytest.raises(ValueError, match="missing 'b'"):
        select_parameters(CHAIN, {"c": 1.0}, 0.6)


def test_always_and_never_take_patterns_and_the_names_of_tied_weights():
    works = [(4, {"embed.weight"}), (4, {"block.0.weight"}), (4, {"block.1.weight"})]
    costs = costs_from(works, forward_flops=6, aliases={"embed.weight": ("head.weight",)})
    importance = {"embed.weight": 1.0, "block.0.weight": 2.0, "block.1.weight": 3.0}
    assert select_parameters(costs, importance, 0.99, never=["head.*"]).trained == {
        "block.0.weight",
        "block.1.weight",
    }
    assert select_parameters(costs, importance, 0.6, always=["head.weight"]).trained == {"embed.weight"}


@pytest.mark.parametrize("budget", [0, 0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget_fraction in \(0, 1\]"):
        select_parameters(CHAIN, {}, budget)


def test_a_budget_that_is_no_number_is_refused():
    with pytest.raises(TypeError, match=r"budget_fraction in \(0, 1\], got '0.5'"):
        select_parameters(CHAIN, {}, "0.5")


def test_a_budget_that_is_too_small_names_the_smallest_that_works():
    with pytest.raises(
        BudgetError, match=r"0\.3 is too small: a step that trains anything takes at least 0\.5 "
    ):
        select_parameters(CHAIN, dict.fromkeys("abc", 1.0), 0.3)
    with pytest.raises(
        BudgetError, match=r"trains 'a', as always requires, takes at least 0\.6667 "
    ) as caught:
        select_parameters(CHAIN, dict.fromkeys("abc", 1.0), 0.5, always=["a"])
    assert caught.value.minimum_budget_fraction == pytest.approx(40 / 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"always": ["d"]}, "'d' matches no"),
        ({"never": ["layer*"]}, "'layer.*' matches no"),
        ({"always": ["a"], "never": ["?"]}, "'a' in both always and never"),
        ({"never": ["*"]}, "never leaves no parameter"),
        ({"importance": {"a": 1.0, "b": 1.0}}, "missing 'c'"),
        ({"importance": {"a": math.nan, "b": math.inf, "c": 1.0}}, r"'a', 'b' is not finite \(nan, inf\)"),
        ({"importance": {"a": 1.0, "b": 1.0, "c": 1.0, "cc": 1.0}}, "'cc', not among .* near names: c"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused_before_any_work(arguments, message, monkeypatch):
    monkeypatch.setattr(
        "gtcompile.selection.selection.solve_knapsack", lambda *_, **__: pytest.fail("solved")
    )
    asked = {"importance": dict.fromkeys("abc", 1.0)} | arguments
    with pytest.raises(ValueError, match=message):
        select_parameters(CHAIN, budget_fraction=0.9, **asked)


def test_a_single_pattern_instead_of_a_list_is_refused():
    with pytest.raises(TypeError, match="'abc'"):
        select_parameters(CHAIN, dict.fromkeys("abc", 1.0), 0.9, always="abc")


def decoder_costs(blocks=32, width=2560, inner=10240, vocabulary=50272, batch=4, length=512, heads=32):
    """An OPT decoder's works: parallel queries, keys and values in a chain of blocks, tied embeddings."""
    tokens, attention = 2 * batch * length, 2 * batch * length * length * width
    works, upstream = [], {"embed", "positions"}
    for block in range(blocks):
        upstream |= {f"{block}.norm1.{kind}" for kind in ("weight", "bias")}
        branches = []
        for name in ("q", "k", "v"):
            works += [(tokens * width * width, {f"{block}.{name}.weight"})]
            works += [(tokens * width * width, frozenset(upstream))]
            branches.append(upstream | {f"{block}.{name}.weight", f"{block}.{name}.bias"})
            works.append((attention, branches[-1]))
        works.append((attention, branches[0] | branches[1]))
        upstream = frozenset().union(*branches)
        for name, size in (("out", width * width), ("fc1", width * inner), ("fc2", width * inner)):
            works += [(tokens * size, {f"{block}.{name}.weight"}), (tokens * size, frozenset(upstream))]
            upstream |= {f"{block}.{name}.{kind}" for kind in ("weight", "bias")}
            upstream |= {f"{block}.norm2.{kind}" for kind in ("weight", "bias") if name == "out"}
    upstream |= {"norm.weight", "norm.bias"}
    works += [(tokens * width * vocabulary, {"embed"}), (tokens * width * vocabulary, frozenset(upstream))]
    return costs_from(works, forward_flops=sum(flops for flops, _ in works) // 2)


DECODER = decoder_costs()


@pytest.mark.parametrize("budget", [0.36, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_a_decoder_of_516_parameters_is_selected_with_proof_in_about_a_second(budget):
    rng = random.Random(budget)
    importance = {name: rng.expovariate(1) for name in sorted(DECODER.fqns)}
    start = time.process_time()
    selection = select_parameters(DECODER, importance, budget)
    seconds = time.process_time() - start
    assert len(DECODER.fqns) == 516
    assert selection.gap == 0
    assert selection.step_fraction > budget - 0.01
    assert seconds < 3  # 0.1 to 0.9 s alone on one core; the rest is for what shares the machine


def test_a_time_limit_returns_the_best_so_far_and_an_honest_bound():
    rng = random.Random(0)
    importance = {name: rng.expovariate(1) for name in sorted(DECODER.fqns)}
    proven = select_parameters(DECODER, importance, 0.7)
    hurried = select_parameters(DECODER, importance, 0.7, time_limit_s=0.01)
    assert hurried.step_flops <= hurried.budget_flops
    assert hurried.importance_bound >= proven.importance >= hurried.importance > 0
    assert hurried.gap > 0
    assert f"at most {hurried.gap:.2%} below the best" in str(hurried)


def test_importances_may_be_numpy_numbers_and_of_any_magnitude():
    for factor in (1e-200, 1e200):
        importance = {
            name: np.float64(value * factor) for name, value in zip("abc", (1, 1, 1.5), strict=True)
        }
        assert select_parameters(CHAIN, importance, 0.5).trained == {"c"}
