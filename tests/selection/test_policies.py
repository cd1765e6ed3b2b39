"""Every policy trains within a mean budget at every step; what each one trains; misuse is refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtcompile import BudgetError, select_parameters
from gtcompile.selection import policies
from gtcompile.selection.blocks import weighted_order
from gtcompile.selection.limits import apply_terms, make_terms
from gtcompile.selection.schedule import Plan, Schedule, seeded
from tests.selection.test_selection import coverage_costs
from tests.support.policies import chain_of_blocks

AT_EVERY_STEP = [policy for name, policy in policies.NAMES.items() if name != "progressive"]
EVERY = [*AT_EVERY_STEP, policies.Progressive(steps=10)]
CHAIN = chain_of_blocks(6)
EVEN = dict.fromkeys(CHAIN.fqns, 1.0)


def schedule_of(policy, costs, importance, budget, *, always=(), never=(), seed=0, number=0):
    """The schedule of a policy, drawn as `AdaptiveBackprop` draws it."""
    limits = apply_terms(costs, make_terms(budget, always, never))
    plan = policies.find_policy(policy).plan(limits, importance, seeded(seed, number, "plan"))
    return Schedule(plan, costs, budget, seed=seed, number=number)


def sets_of(schedule, steps):
    return [schedule.next_set() for _ in range(steps)]


@st.composite
def trainings(draw, among=EVERY):
    """A policy, costs with importances, and a budget that trains something."""
    chains = st.builds(chain_of_blocks, st.integers(1, 6), st.integers(1, 3), embedding=st.booleans())
    costs = draw(st.one_of(chains, coverage_costs()))
    importance = {fqn: draw(st.floats(0.0, 5.0, width=32)) for fqn in sorted(costs.fqns)}
    budget = draw(st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.4, 0.5, 0.7, 1.0])))
    budget = max(budget, costs.minimum_budget_fraction)
    return draw(st.sampled_from(among)), costs, importance, budget


@settings(max_examples=300, deadline=None)
@given(trainings(AT_EVERY_STEP), st.integers(1, 60), st.integers(0, 5))
def test_the_mean_budget_holds_after_every_step_of_every_other_policy(training, steps, seed):
    policy, costs, importance, budget = training
    schedule = schedule_of(policy, costs, importance, budget, seed=seed)
    spent = 0
    for step in range(1, steps + 1):
        trained = schedule.next_set()
        assert trained <= costs.fqns
        assert trained or policy == policies.Paper()
        spent += costs.step_flops(trained)
        assert spent <= budget * costs.full_flops * step * (1 + 1e-12)
    assert schedule.progress.spent_flops == spent


@settings(max_examples=300, deadline=None)
@given(trainings(), st.integers(1, 40))
def test_progressive_freezing_is_within_the_budget_at_its_end_and_never_thaws(training, steps):
    _, costs, importance, budget = training
    schedule = schedule_of(policies.Progressive(steps=steps), costs, importance, budget)
    sets = sets_of(schedule, steps)
    assert sum(map(costs.step_flops, sets)) <= budget * costs.full_flops * steps * (1 + 1e-12)
    assert all(later <= earlier for earlier, later in itertools.pairwise(sets))
    if budget == 1.0:
        assert set(sets) == {costs.fqns}
    beyond = costs.step_flops(schedule.next_set())
    assert beyond <= budget * costs.full_flops


def test_progressive_freezing_begins_deep_and_spends_its_budget():
    schedule = schedule_of(policies.Progressive(steps=200), CHAIN, {}, 0.8)
    sets = sets_of(schedule, 200)
    assert sets[0] == CHAIN.fqns
    assert 0.77 < schedule.spent_fraction <= 0.8
    assert len(set(sets)) > 5, "blocks freeze one after another"


def test_progressive_freezing_must_know_its_length():
    with pytest.raises(ValueError, match=r"for how many optimizer steps .*Progressive\(steps=\.\.\.\)"):
        policies.for_training(policies.find_policy("progressive"), None)
    assert policies.for_training(policies.Progressive(), 7) == policies.Progressive(steps=7)
    assert policies.for_training(policies.Progressive(steps=3), 7) == policies.Progressive(steps=3)
    assert policies.for_training(policies.Best(), None) == policies.Best()


@settings(max_examples=100, deadline=None)
@given(trainings(), st.data())
def test_every_set_contains_always_and_nothing_of_never(training, data):
    policy, costs, importance, _ = training
    role = {
        fqn: data.draw(st.sampled_from(["open", "open", "always", "never"])) for fqn in sorted(costs.fqns)
    }
    role[min(role)] = "open"
    always, never = ({fqn for fqn in role if role[fqn] == kind} for kind in ("always", "never"))
    for trained in sets_of(schedule_of(policy, costs, importance, 1.0, always=always, never=never), 10):
        assert always <= trained
        assert trained.isdisjoint(never)


def test_savings_are_spent_and_everything_is_trained_in_the_end():
    schedule = schedule_of("occasionally_full", CHAIN, {}, 0.7)
    sets = sets_of(schedule, 400)
    assert set(sets) == {CHAIN.fqns, schedule.plan.shallow}
    assert schedule.spent_fraction > 0.69
    full_steps = [step for step, trained in enumerate(sets) if trained == CHAIN.fqns]
    waits = [later - earlier for earlier, later in itertools.pairwise(full_steps)]
    assert len(set(waits)) > 1, "full steps come at fixed intervals"


def test_deep_blocks_get_their_turn_in_sampled_sets_though_they_look_unimportant():
    importance = {fqn: 100.0 if fqn.startswith("layers.5") else 0.0 for fqn in CHAIN.fqns}
    trained = set()
    for number in range(20):
        sampled = sets_of(schedule_of("sampled", CHAIN, importance, 0.6, number=number), 20)
        trained |= set().union(*sampled)
    assert trained == CHAIN.fqns


def test_important_parameters_are_sampled_more_often():
    importance = {fqn: 9.0 if fqn == "layers.4.0" else 0.1 for fqn in CHAIN.fqns}
    plans = [
        schedule_of(policies.Sampled(exploration=0.1), CHAIN, importance, 0.7, number=n).plan
        for n in range(9)
    ]
    drawn = [each for plan in plans for each in plan.sets]
    counts = {fqn: sum(fqn in each for each in drawn) for fqn in ("layers.4.0", "layers.4.1")}
    assert counts["layers.4.0"] > 1.2 * counts["layers.4.1"]


def test_best_is_the_optimum_at_every_step():
    importance = {fqn: float(len(fqn)) for fqn in CHAIN.fqns}
    expected = select_parameters(CHAIN, importance, 0.6).trained
    assert sets_of(schedule_of("best", CHAIN, importance, 0.6), 5) == [expected] * 5


def test_last_layers_are_whole_blocks_from_the_output_on_and_what_fits_of_the_next():
    (trained,) = set(sets_of(schedule_of("last_layers", CHAIN, {}, 0.55), 3))
    assert {"norm.weight", "layers.5.0", "layers.5.1"} <= trained
    assert not any(fqn.startswith(("layers.0", "layers.1", "embed")) for fqn in trained)
    assert all(CHAIN.step_flops(trained | {fqn}) > 0.55 * CHAIN.full_flops for fqn in CHAIN.fqns - trained)


def test_where_not_even_one_block_fits_the_cheapest_parameters_are_trained():
    costs = chain_of_blocks(3, weights=4, embedding=False)
    (trained,) = set(sets_of(schedule_of("last_layers", costs, {}, costs.minimum_budget_fraction), 3))
    assert len(trained) == 1


def test_random_sets_change_from_step_to_step_and_fit_the_budget():
    sets = set(sets_of(schedule_of("random", CHAIN, {}, 0.6), 40))
    assert len(sets) > 3
    assert all(CHAIN.step_flops(trained) <= 0.6 * CHAIN.full_flops for trained in sets)


def test_rotating_trains_one_block_at_a_time_in_turn():
    schedule = schedule_of("rotating", CHAIN, {}, 0.9)
    turns = [s for s in sets_of(schedule, 60) if s != schedule.plan.shallow]
    blocks = [frozenset(fqn for fqn in CHAIN.fqns if fqn.startswith(f"layers.{i}.")) for i in range(6)]
    assert [each for each in turns if each in blocks][:7] == [*blocks[::-1], blocks[-1]]


def test_rotating_stays_with_a_block_for_as_many_steps_as_wanted():
    sets = sets_of(schedule_of(policies.Rotating(steps=3), CHAIN, {}, 1.0), 9)
    assert [sets[0]] * 3 + [sets[3]] * 3 + [sets[6]] * 3 == sets
    assert len(set(sets)) == 3


def test_lisa_trains_a_few_blocks_with_everything_outside_of_blocks():
    schedule = schedule_of("lisa", CHAIN, {}, 0.9)
    for trained in set(sets_of(schedule, 60)) - {schedule.plan.shallow}:
        assert {"embed.weight", "norm.weight"} <= trained
        assert len({fqn.split(".")[1] for fqn in trained if fqn.startswith("layers")}) == 2


def test_the_papers_set_waits_where_it_overspends():
    costs = chain_of_blocks(40, weights=1, flops=10**6)
    schedule = schedule_of("paper", costs, dict.fromkeys(costs.fqns, 1.0), 0.5)
    (published,) = schedule.plan.sets
    assert costs.step_flops(published) > 0.45 * costs.full_flops
    assert published in sets_of(schedule, 100)


def test_equal_seeds_draw_equal_sets_and_others_draw_others():
    def drawn(seed, number):
        return sets_of(schedule_of("sampled", CHAIN, EVEN, 0.6, seed=seed, number=number), 30)

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0)
    assert drawn(0, 0) != drawn(0, 1)


def test_a_set_that_nothing_can_be_saved_for_waits_for_ever():
    plan = Plan(sets=(CHAIN.fqns,), shallow=frozenset({"norm.weight"}))
    budget = CHAIN.step_flops({"norm.weight"}) / CHAIN.full_flops
    assert set(sets_of(Schedule(plan, CHAIN, budget, seed=0, number=0), 50)) == {frozenset({"norm.weight"})}


def test_a_budget_below_the_cheapest_step_is_refused_by_every_policy():
    for policy in EVERY:
        with pytest.raises(BudgetError):
            schedule_of(policy, CHAIN, EVEN, math.nextafter(CHAIN.minimum_budget_fraction, 0))


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("samples", ValueError, "no policy 'samples'; near names: sampled"),
        (3, TypeError, "expected the name of a policy"),
        (policies.Sampled, TypeError, "expected the name of a policy"),
    ],
)
def test_what_is_no_policy_is_refused(policy, error, message):
    with pytest.raises(error, match=message):
        policies.find_policy(policy)


@pytest.mark.parametrize(
    "make",
    [
        lambda: policies.Sampled(exploration=0.0),
        lambda: policies.Sampled(exploration=1.5),
        lambda: policies.Rotating(steps=0),
        lambda: policies.Lisa(blocks=0),
        lambda: policies.Progressive(steps=0),
    ],
)
def test_a_description_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_a_seeded_generator_depends_on_all_of_its_key():
    first, again, other = (torch.rand(3, generator=seeded(*key)) for key in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(st.floats(1e-6, 1e-3), st.permutations([0.1, 0.2, 0.3, 0.4, 1.0]))
def test_names_of_one_weight_are_drawn_by_chance_however_small_it_is(weight, uniform):
    names = dict(zip("abcde", uniform, strict=True))
    assert weighted_order(dict.fromkeys(names, weight), names) == sorted(names, key=names.get, reverse=True)
