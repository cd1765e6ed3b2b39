"""AdaptiveBackprop with policies that change what is trained at every step."""

import copy
import itertools
import json
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gtcompile import (
    AdaptiveBackprop,
    CaptureError,
    GTCompileError,
    compile_blocks,
    measure_importance,
    policies,
    trained_parameters,
)
from tests.support.launching import run_on_ranks
from tests.support.models import WIDTH, ResidualMLP, Stack, captures

BUDGET = 0.7
PROGRESSIVE = policies.Progressive(steps=20)
EVERY = [*(name for name in sorted(policies.NAMES) if name != "progressive"), PROGRESSIVE]


def make(policy="best", *, compiled=True, budget=BUDGET, **options):
    torch.manual_seed(0)
    model = Stack([ResidualMLP() for _ in range(5)], tied=False)
    if compiled:
        compile_blocks(model, compiler="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, AdaptiveBackprop(model, optimizer, budget, policy=policy, **options)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, WIDTH, generator=generator) for name in ("x", "y")}


def train_step(model, optimizer, adaptive, seed, accumulate=1):
    """One optimizer step; what was trained in it, what had a gradient, and the FLOPs of each backward."""
    trained, flops = trained_parameters(model), []
    for part in range(accumulate):
        with FlopCounterMode(display=False) as counter:
            model(**batch(10 * seed + part)).backward()
        flops.append(counter.get_total_flops())
    with_gradient = {fqn for fqn, p in model.named_parameters() if p.grad is not None}
    frozen = {fqn: p.detach().clone() for fqn, p in model.named_parameters() if fqn not in trained}
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(model.get_parameter(fqn), value) for fqn, value in frozen.items())
    adaptive.step()
    return trained, with_gradient, flops


@pytest.mark.parametrize("policy", EVERY)
def test_every_policy_trains_exactly_its_set_at_every_step_of_compiled_blocks(policy):
    model, optimizer, adaptive = make(policy)
    for epoch in range(2):
        selection = adaptive.reselect([batch(100 + epoch), batch(200 + epoch)])
        assert selection.trained == trained_parameters(model)
        for step in range(5):
            trained, with_gradient, _ = train_step(model, optimizer, adaptive, step, accumulate=2)
            assert with_gradient == trained


@pytest.mark.parametrize("policy", EVERY[:-1])
def test_the_flops_that_are_counted_are_within_the_mean_budget_after_every_step(policy):
    model, optimizer, adaptive = make(policy, compiled=False)
    for epoch, steps in enumerate((9, 4)):
        selection = adaptive.reselect([batch(100 + epoch), batch(200 + epoch)])
        spent = 0
        for step in range(1, steps + 1):
            _, _, flops = train_step(model, optimizer, adaptive, step)
            spent += flops[0]
            assert spent <= BUDGET * selection.full_flops * step


def test_progressive_freezing_goes_on_over_selections_and_is_within_the_budget_at_its_end():
    model, optimizer, adaptive = make(PROGRESSIVE, compiled=False)
    sets, spent, full = [], 0, 0
    for epoch, steps in enumerate((9, 11)):
        full = adaptive.reselect([batch(100 + epoch)]).full_flops
        for step in range(steps):
            trained, _, flops = train_step(model, optimizer, adaptive, step)
            sets.append(trained)
            spent += flops[0]
    assert spent <= BUDGET * full * 20
    assert all(later <= earlier for earlier, later in itertools.pairwise(sets))
    assert len(set(sets)) > 3


def test_a_policy_that_must_know_the_number_of_steps_says_so_at_once():
    with pytest.raises(ValueError, match="for how many optimizer steps"):
        make("progressive")


def test_a_policy_that_changes_sets_changes_them_and_compiles_nothing():
    model, optimizer, adaptive = make("sampled")
    adaptive.reselect([batch(1), batch(2)])
    train_step(model, optimizer, adaptive, 0)
    before = captures()
    sets = {train_step(model, optimizer, adaptive, step)[0] for step in range(25)}
    assert len(sets) > 3
    assert captures() == before


def test_with_one_set_for_all_steps_a_step_leaves_everything_as_it_is():
    model, optimizer, adaptive = make("best")
    selection = adaptive.reselect([batch(1), batch(2)])
    for step in range(4):
        trained, *_ = train_step(model, optimizer, adaptive, step)
        assert trained == selection.trained
    assert adaptive.spent_fraction == pytest.approx(selection.step_fraction)
    assert adaptive.step_flops == selection.step_flops


def test_a_policy_that_measures_nothing_needs_one_batch_and_runs_no_backward():
    model, _, adaptive = make("occasionally_full")
    model.head.weight.register_hook(lambda _: pytest.fail("a backward ran"))
    selection = adaptive.reselect([batch(1)])
    assert adaptive.importance == {}
    assert selection.importance_bound is None
    assert "importance" not in str(selection)


def test_a_policy_of_the_users_own_is_called_for_every_step():
    calls = []

    def by_turns(costs, importance, budget_fraction, generator):
        calls.append((set(importance) == costs.fqns, budget_fraction, torch.rand((), generator=generator)))
        return ["head.weight"] if len(calls) % 2 else ["head.bias", "head.weight"]

    model, optimizer, adaptive = make(by_turns)
    adaptive.reselect([batch(1), batch(2)])
    sets = [train_step(model, optimizer, adaptive, step)[0] for step in range(4)]
    assert sets == [{"head.weight"}, {"head.bias", "head.weight"}] * 2
    assert [(complete, budget) for complete, budget, _ in calls] == [(True, BUDGET)] * 5
    assert len({number.item() for *_, number in calls}) == 5


def test_the_users_own_costly_sets_wait_until_they_are_paid_for():
    model, optimizer, adaptive = make(lambda costs, *_: costs.fqns)
    selection = adaptive.reselect([batch(1), batch(2)])
    sets = [train_step(model, optimizer, adaptive, step)[0] for step in range(40)]
    assert set(sets) == {selection.trained, frozenset(dict(model.named_parameters()))}
    assert 0.6 < adaptive.spent_fraction <= BUDGET


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (["head.wieght"], ValueError, r"'head\.wieght' matches no .*near names: head\.weight"),
        ([], ValueError, "returned no parameter"),
        ("head.weight", TypeError, "got the string"),
        (None, TypeError, "expected a collection of FQNs or shell-style patterns, got None"),
    ],
)
def test_what_the_users_policy_returns_is_checked_and_nothing_changes(returned, error, message):
    model, _, adaptive = make(lambda *_: returned)
    with pytest.raises(error, match=message):
        adaptive.reselect([batch(1), batch(2)])
    assert adaptive.history == ()
    assert trained_parameters(model) == set(dict(model.named_parameters()))


def own_random(costs, importance, budget_fraction, generator):
    names = sorted(costs.fqns)
    return [names[i] for i in torch.randperm(len(names), generator=generator)[:3]]


@pytest.mark.parametrize("policy", ["sampled", "rotating", own_random, PROGRESSIVE])
def test_training_resumed_in_the_middle_of_an_epoch_goes_on_bit_for_bit(policy):
    def steps(model, optimizer, adaptive, numbers):
        return [train_step(model, optimizer, adaptive, number)[0] for number in numbers]

    def begin():
        model, optimizer, adaptive = make(policy, seed=3)
        adaptive.reselect([batch(1), batch(2)])
        return model, optimizer, adaptive

    straight = begin()
    sets = steps(*straight, range(20))
    model, optimizer, adaptive = begin()
    assert steps(model, optimizer, adaptive, range(7)) == sets[:7]
    saved = json.loads(json.dumps(adaptive.state_dict()))

    resumed, resumed_optimizer, continued = make(policy, budget=0.9)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    continued.load_state_dict(saved)
    assert continued.state_dict() == saved
    assert steps(resumed, resumed_optimizer, continued, range(7, 20)) == sets[7:]
    assert len(set(sets[7:])) > 1
    for ours, theirs in zip(resumed.parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = continued.reselect([batch(3), batch(4)]), straight[2].reselect([batch(3), batch(4)])
    assert ours == theirs


def test_the_state_of_another_policy_is_refused():
    _, _, adaptive = make("sampled")
    adaptive.reselect([batch(1), batch(2)])
    _, _, other = make(policies.Sampled(exploration=0.5))
    with pytest.raises(ValueError, match=r"policy Sampled\(exploration=0\.3\), and here .*0\.5"):
        other.load_state_dict(adaptive.state_dict())


def test_a_step_before_the_first_selection_is_refused():
    _, _, adaptive = make()
    with pytest.raises(GTCompileError, match=r"call reselect\(batches\) before step"):
        adaptive.step()


class Pair(NamedTuple):
    """A batch that is no dictionary."""

    inputs: torch.Tensor
    targets: torch.Tensor


def squared_error(model, pair):
    return ((model(pair.inputs) - pair.targets) ** 2).mean()


def regression(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, AdaptiveBackprop(model, optimizer, 0.8, loss_fn=squared_error, **options)


def pairs(count):
    return [Pair(torch.randn(5, 6), torch.randn(5, 6)) for _ in range(count)]


def test_importance_is_measured_with_a_loss_of_the_users_own_on_batches_of_any_structure():
    model, _ = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = pairs(2)
    gradients = []
    for each in (first, second):
        gradients.append(torch.autograd.grad(squared_error(model, each), list(model.parameters())))
    measured = measure_importance(model, optimizer, [first, second], loss_fn=squared_error)
    for index, fqn in enumerate(dict(model.named_parameters())):
        expected = 0.1 * (gradients[0][index] * gradients[1][index]).sum().item()
        assert measured[fqn] == pytest.approx(expected, rel=1e-4)


def test_a_loss_function_that_returns_no_scalar_is_refused():
    model, _ = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CaptureError, match=r"loss_fn\(model, batch\) to return a scalar tensor, got shape"):
        measure_importance(model, optimizer, pairs(2), loss_fn=lambda model, pair: model(pair.inputs))


def test_selection_works_with_a_loss_of_the_users_own():
    model, adaptive = regression()
    selection = adaptive.reselect(pairs(2))
    with FlopCounterMode(display=False) as counter:
        squared_error(model, pairs(1)[0]).backward()
    assert counter.get_total_flops() == selection.step_flops < selection.full_flops


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("policy", ["sampled", "own"])
def test_two_ranks_agree_on_the_set_at_every_step(policy):
    run_on_ranks("policies_run", policy)
