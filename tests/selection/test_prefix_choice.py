"""The weighing of a frozen prefix against exhaustive search, and how long it takes."""

import itertools
import math
import time
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gtcompile import BackwardCosts, BudgetError
from gtcompile.costs.backward_costs import SharedWork
from gtcompile.graph.joint_graph import Parameter
from gtcompile.selection import prefix_choice
from gtcompile.selection.cached_prefix import CachedPrefix
from gtcompile.selection.limits import apply_terms, make_terms
from gtcompile.selection.policies import Best
from gtcompile.selection.prefix_choice import choose_prefix
from gtcompile.selection.selection import select_within

IMPORTANCE = st.one_of(st.integers(-3, 9).map(float), st.floats(0.0625, 5.0, width=32))


def stack_costs(weights, activations, forwards, head_forward):
    """A model of blocks, `b0` nearest the input: lists of weight gradients' FLOPs, one list per block.

    The activation gradient of a block runs if anything in a block below it is trained.
    """
    names = [[f"b{block}.w{i}" for i in range(len(each))] for block, each in enumerate(weights)]
    works = [
        SharedWork(flops, frozenset({name}))
        for block, each in zip(names, weights, strict=True)
        for name, flops in zip(block, each, strict=True)
        if flops
    ]
    for block, flops in enumerate(activations):
        if below := frozenset(itertools.chain.from_iterable(names[:block])):
            works.append(SharedWork(flops, below))
    fqns = itertools.chain.from_iterable(names)
    costs = BackwardCosts(
        parameters=tuple(Parameter(fqn=fqn, shape=(2,), dtype=torch.float32) for fqn in fqns),
        forward_flops=sum(forwards) + head_forward,
        shared_work=tuple(works),
    )
    depths = {name: block for block, each in enumerate(names) for name in each}
    return costs, depths


@st.composite
def questions(draw):
    """Costs, depths, a cache, importances, a budget that suffices, and what is trained always or never."""
    blocks = draw(st.integers(1, 3))
    flops = st.integers(0, 30)
    weights = [draw(st.lists(flops, min_size=1, max_size=2)) for _ in range(blocks)]
    activations, forwards = ([draw(flops) for _ in range(blocks)] for _ in range(2))
    costs, depths = stack_costs(weights, activations, forwards, 1 + draw(flops))
    names = sorted(costs.fqns)
    importance = {name: draw(IMPORTANCE) for name in names}
    roles = {name: draw(st.sampled_from(["open"] * 6 + ["always", "never"])) for name in names[1:]}
    always, never = ([n for n, role in roles.items() if role == kind] for kind in ("always", "never"))
    budget = draw(st.floats(0.05, 1.0))
    try:
        limits = apply_terms(costs, make_terms(budget, always, never))
    except BudgetError as error:
        limits = apply_terms(costs, make_terms(error.minimum_budget_fraction, always, never))
    shares = st.fractions(0, 1, max_denominator=64)
    prefix = CachedPrefix(
        depths=depths,
        block_flops=tuple(forwards),
        epochs=draw(st.integers(1, 4)),
        held=draw(st.integers(0, blocks)),
        hits=draw(shares),
        later_hits=draw(shares),
    )
    return replace(limits, prefix=prefix), importance


def every_set(limits, importance):
    """Every set that a selection may return: with `always`, without `never`, nothing that raises the loss."""
    optional = [n for n in sorted(limits.trainable - limits.always) if importance[n] >= 0]
    for size in range(len(optional) + 1):
        for chosen in itertools.combinations(optional, size):
            yield limits.always | frozenset(chosen)


def best_total(limits, importance):
    """The greatest total importance over the epochs, by trying all sets of the first and of the others."""
    prefix, costs = limits.prefix, limits.costs
    sets = [
        (each, prefix.most_blocks(each), costs.step_flops(each)) for each in every_set(limits, importance)
    ]

    def worth(trained):
        return math.fsum(importance[name] for name in trained)

    def best_later(kept):
        room = limits.budget_flops + int(prefix.later_hits * prefix.saved_flops(kept))
        fitting = (worth(each) for each, depth, flops in sets if depth >= kept and flops <= room)
        return max(fitting, default=-math.inf)

    later = [best_later(kept) for kept in range(len(prefix.block_flops) + 1)]
    held_room = limits.budget_flops + int(prefix.hits * prefix.saved_flops(prefix.held))
    best = -math.inf
    for each, depth, flops in sets:
        if not each or not (limits.always or worth(each) > 0 or flops == costs.forward_flops):
            continue  # parameters of importance 0 are trained beside others, or if they cost nothing
        if flops <= limits.budget_flops:  # whatever is kept is computed once more
            following = max(later[: depth + 1]) if prefix.epochs > 1 else 0.0
            best = max(best, worth(each) + (prefix.epochs - 1) * following)
        if 0 < prefix.held <= depth and flops <= held_room:
            following = later[prefix.held] if prefix.epochs > 1 else 0.0
            best = max(best, worth(each) + (prefix.epochs - 1) * following)
    return best


def is_weighed(limits, importance):
    """Whether importances differ from 0, something is worth training, and not everything fits."""
    everything = not limits.never and limits.costs.full_flops <= limits.budget_flops
    return not everything and any(importance[n] for n in limits.to_measure)


@settings(max_examples=150, deadline=None)
@given(questions())
def test_the_choice_is_as_good_as_exhaustive_search_finds(question):
    limits, importance = question
    selection = choose_prefix(limits, importance)
    if not is_weighed(*question):
        return
    if (best := best_total(*question)) == -math.inf:
        assert not selection.trained
        return
    assert selection.trained
    scale = limits.prefix.epochs * math.fsum(map(abs, importance.values()))
    assert selection.planned_importance == pytest.approx(best, abs=1e-5 * scale)
    assert selection.gap == 0.0


@settings(max_examples=150, deadline=None)
@given(questions(), st.integers(1, 200))
def test_the_steps_of_an_epoch_stay_within_the_budget(question, steps):
    limits, importance = question
    prefix = replace(limits.prefix, hits=Fraction(steps - 1, steps))
    limits = replace(limits, prefix=prefix)
    selection = choose_prefix(limits, importance)
    flops = limits.costs.step_flops(selection.trained)
    if selection.saved_flops:
        assert selection.kept_blocks == prefix.held <= prefix.most_blocks(selection.trained)
        hit = flops - prefix.saved_flops(prefix.held)
        assert flops + (steps - 1) * hit <= steps * limits.budget_flops
    else:
        assert flops <= limits.budget_flops
    assert selection.step_flops <= selection.budget_flops == limits.budget_flops


@settings(max_examples=60, deadline=None)
@given(questions())
def test_in_the_last_epoch_with_an_empty_cache_nothing_is_weighed(question):
    limits, importance = question
    assume(any(importance[name] for name in limits.undecided))  # else there, all count as equal
    limits = replace(limits, prefix=replace(limits.prefix, epochs=1, held=0, later_hits=Fraction(0)))
    chosen, plain = choose_prefix(limits, importance), select_within(replace(limits, prefix=None), importance)
    assert chosen.importance == pytest.approx(plain.importance, abs=1e-9)
    assert chosen.step_flops <= plain.budget_flops
    assert chosen.saved_flops == 0


def deep_model(held, epochs):
    """Four blocks alike; the budget trains the last two, or the first one alone."""
    costs, depths = stack_costs([[10]] * 4, [2] * 4, [10] * 4, 0)
    prefix = CachedPrefix(
        depths=depths, block_flops=(10,) * 4, epochs=epochs, held=held, hits=Fraction(1 if held else 0)
    )
    return replace(apply_terms(costs, make_terms(0.75, (), ())), prefix=prefix)


def importances(*values):
    return {f"b{block}.w0": value for block, value in enumerate(values)}


def test_a_held_prefix_lets_more_be_trained_above_it():
    without, kept = (choose_prefix(deep_model(held, 1), importances(1.0, 1.0, 2.0, 2.0)) for held in (0, 1))
    assert without.trained == {"b2.w0", "b3.w0"}
    assert kept.trained == {"b1.w0", "b2.w0", "b3.w0"}
    assert (kept.kept_blocks, kept.saved_flops, kept.step_flops) == (1, 10, 74 - 10)
    assert str(kept) == (
        "3 of 4 parameters, 74.4% of a full step's FLOPs (budget 74.4%), 11.6% saved by 1 block kept in the "
        "prefix cache, importance 5, proven the best"
    )


@pytest.mark.parametrize(("middle", "trained"), [(5.0, {"b1.w0"}), (-5.0, set())])
def test_a_held_prefix_pays_for_a_set_where_without_it_nothing_is_worth_training(middle, trained):
    """The plain budget trains the first or the last block, which raises the loss."""
    costs, depths = stack_costs([[10], [30], [10]], [2] * 3, [10] * 3, 0)
    prefix = CachedPrefix(depths=depths, block_flops=(10,) * 3, epochs=2, held=1, hits=Fraction(1))
    limits = replace(apply_terms(costs, make_terms(55 / costs.full_flops, (), ())), prefix=prefix)
    assert limits.budget_flops == 55
    importance = importances(-1.0, middle, -1.0)
    assert not select_within(replace(limits, prefix=None), importance).trained
    selection = choose_prefix(limits, importance)
    assert selection.trained == trained
    assert selection.planned_importance == (2 * middle if trained else 0.0)
    assert selection.gap == 0.0


@pytest.mark.parametrize(("deep", "kept"), [(3.0, 2), (50.0, 0)])
def test_a_deep_parameter_is_trained_where_it_is_worth_more_than_what_the_cache_saves(deep, kept):
    selection = choose_prefix(deep_model(held=2, epochs=1), importances(deep, 0.5, 2.0, 2.0))
    assert ("b0.w0" in selection.trained) == (kept == 0)
    assert (selection.kept_blocks, selection.saved_flops) == (kept, 10 * kept)


def test_the_epochs_to_come_decide_which_blocks_are_kept():
    """In one epoch alone the last two blocks are best; with more to come, one more block is left to train."""
    importance = importances(0.0, 1.9, 2.0, 2.0)
    first, many = (choose_prefix(deep_model(held=0, epochs=epochs), importance) for epochs in (1, 5))
    assert first.trained == many.trained == {"b2.w0", "b3.w0"}
    assert (first.kept_blocks, many.kept_blocks) == (2, 1)
    assert many.planned_importance == pytest.approx(4.0 + 4 * 5.9)


def test_the_policy_trains_nothing_in_the_blocks_that_it_keeps():
    limits = deep_model(held=1, epochs=3)
    plan = Best().plan(limits, importances(1.0, 1.0, 2.0, 2.0), torch.Generator())
    assert plan.kept_blocks == 1
    assert plan.saved_flops == 10
    assert "b0.w0" not in plan.shallow | plan.sets[0]


@settings(max_examples=150, deadline=None)
@given(questions())
def test_steps_that_pay_for_others_train_something_outside_of_the_kept_blocks(question):
    limits, importance = question
    plan = Best().plan(limits, importance, torch.Generator())
    assume(plan.sets[0])
    assert plan.shallow
    assert plan.shallow.isdisjoint(limits.prefix.inside(plan.kept_blocks))
    assert limits.costs.step_flops(plan.shallow) - plan.saved_flops <= limits.budget_flops


def test_the_cheapest_step_outside_of_the_kept_blocks_may_need_what_the_cache_saves():
    costs, depths = stack_costs([[10], [30], [10]], [2] * 3, [10] * 3, 0)
    prefix = CachedPrefix(depths=depths, block_flops=(10,) * 3, epochs=2, held=1, hits=Fraction(1))
    terms = make_terms(55 / costs.full_flops, (), ["b2.w0"])
    plan = Best().plan(
        replace(apply_terms(costs, terms), prefix=prefix), importances(1.0, 5.0), torch.Generator()
    )
    assert plan.shallow == plan.sets[0] == {"b1.w0"}


def test_a_model_as_large_as_opt_2_7b_is_weighed_by_a_few_searches(monkeypatch):
    """32 blocks with ten matrices and vectors each; bounds leave most numbers of blocks out."""
    unit = 10**9
    costs, depths = stack_costs(
        [[unit + 7919 * i * (block + 1) for i in range(10)] for block in range(32)],
        [12 * unit] * 32, [12 * unit] * 32, 20 * unit,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(320, generator=generator).exp().tolist()
    prefix = CachedPrefix(depths=depths, block_flops=(12 * unit,) * 32, epochs=4)
    limits = replace(apply_terms(costs, make_terms(0.5, (), ())), prefix=prefix)
    solved, optimum = [], prefix_choice.optimum
    monkeypatch.setattr(prefix_choice, "optimum", lambda *given: solved.append(1) or optimum(*given))
    began = time.process_time()
    selection = choose_prefix(limits, dict(zip(sorted(costs.fqns), drawn, strict=True)))
    assert time.process_time() - began < 5  # about one, on a quiet machine
    assert selection.gap == 0.0
    assert selection.kept_blocks > 0
    assert len(solved) < 12
