"""Seconds and bytes of steps: predicted and measured, and a training within such budgets."""

import json

import pytest
import torch

import gtcompile
from gtcompile import AdaptiveBackprop, BudgetError, step_prices
from gtcompile.costs.backward_costs import SharedWork
from gtcompile.costs.dependency_graph import capture_everything
from gtcompile.costs.prices import StepPrices
from gtcompile.prices import step_timing
from gtcompile.prices.step_timing import MeasuredRates, StepRates, _backward_flops, probe_sets
from gtcompile.tools.common.step_memory import saved_bytes
from tests.prefix.test_prefix_costs import make_batches, make_llama
from tests.selection.test_selection import CHAIN

RATES = StepRates(fixed=1e-3, shared_flop=2e-9, own_flop=3e-9, parameter=1e-5, element=1e-8)


@pytest.fixture(scope="module", autouse=True)
def captured_once():
    """A capture takes most of a short test; the graph of one model at one shape is always the same."""
    known = {}

    def remembered(model, batch, loss_fn):
        key = tuple(batch["input_ids"].shape)
        if key not in known:
            known[key] = capture_everything(model, batch, loss_fn)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gtcompile.prices.step_prices.capture_everything", remembered)
        patch.setattr("gtcompile.training.step_costs.capture_everything", remembered)
        yield


@pytest.fixture(scope="module")
def prices():
    """Bytes of the model with new AdamW state; its seconds are those of made-up rates."""
    model = make_llama()
    return step_prices(model, torch.optim.AdamW(model.parameters()), make_batches(1)[0], seconds=False)


@pytest.fixture
def rates_known(monkeypatch):
    """Seconds follow from known rates, so that no test depends on how busy the machine is."""
    calls = []

    def measured(*arguments):
        calls.append(arguments)
        return RATES

    monkeypatch.setattr("gtcompile.prices.budget_prices.measure_rates", measured)
    return calls


def bytes_of_training(model, optimizer, batch, trained):
    """What a step takes beside the weights, measured: saved values, gradients, optimizer state."""
    gtcompile.train_only(model, trained)
    saved = saved_bytes(lambda: model(**batch).loss, model)
    model(**batch).loss.backward()
    optimizer.step()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = optimizer.state.values()
    return saved + gradients + sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t))


@pytest.mark.parametrize("pattern", ["model.layers.4.*", "lm_head.weight", "*"])
def test_bytes_are_those_of_a_measured_step_within_two_percent(prices, pattern):
    model, batch = make_llama(), make_batches(1)[0]
    optimizer = torch.optim.AdamW(model.parameters())
    trained = gtcompile.train_only(model, [pattern])
    measured = bytes_of_training(model, optimizer, batch, trained)
    assert prices.step_bytes(trained) == pytest.approx(measured, rel=0.02)


def test_an_optimizer_without_state_takes_bytes_for_gradients_alone(prices):
    model = make_llama()
    plain = step_prices(model, torch.optim.SGD(model.parameters()), make_batches(1)[0], seconds=False)
    name = "lm_head.weight"
    moments = 2 * model.lm_head.weight.nbytes + 4  # and the step count
    assert prices.step_bytes([name]) - plain.step_bytes([name]) == moments


@pytest.mark.parametrize(("setting", "kept"), [("keep", True), ("drop", False)])
def test_state_that_stays_counts_for_every_set(setting, kept):
    model, batch = make_llama(), make_batches(1)[0]
    optimizer = torch.optim.AdamW(model.parameters())
    how = {"seconds": False, "frozen_state": setting}
    before = step_prices(model, optimizer, batch, **how)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    after = step_prices(model, optimizer, batch, **how)
    everything = [name for name, _ in model.named_parameters()]
    assert after.step_bytes(everything) == before.step_bytes(everything)
    more = after.step_bytes(["lm_head.weight"]) - before.step_bytes(["lm_head.weight"])
    others = sum(2 * p.nbytes + 4 for name, p in model.named_parameters() if name != "lm_head.weight")
    assert more == (others if kept else 0)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = make_llama()
    with pytest.raises(ValueError, match="meta device"):
        step_prices(model, torch.optim.AdamW(model.parameters()), make_batches(1)[0])


def test_rates_are_found_again_from_steps_that_take_what_they_say(monkeypatch):
    def seconds_of(trained):
        shared, own = _backward_flops(CHAIN, trained)
        return 1e-3 + 2e-6 * shared + 3e-6 * own + 1e-5 * len(trained)

    times = {trained: seconds_of(trained) for trained in probe_sets(CHAIN)}
    fixed, shared, own, launch = step_timing._fit(CHAIN, times)
    price = StepRates(fixed=fixed, shared_flop=shared, own_flop=own, parameter=launch, element=0).price(CHAIN)
    for trained, seconds in times.items():
        assert StepPrices(nanoseconds=price).step_seconds(trained) == pytest.approx(seconds, rel=1e-6)
    assert SharedWork(10, frozenset("a")) in CHAIN.shared_work


def test_measuring_seconds_changes_nothing_and_more_training_takes_longer():
    model, batch = make_llama(), make_batches(1, rows=4, tokens=32)[0]
    optimizer = torch.optim.AdamW(model.parameters())
    gtcompile.train_only(model, ["lm_head.*"])
    model(**batch).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient, random = model.lm_head.weight.grad, torch.get_rng_state()
    prices = step_prices(model, optimizer, batch, memory=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.lm_head.weight.grad is gradient
    assert torch.equal(torch.get_rng_state(), random)
    assert gtcompile.trained_parameters(model) == {"lm_head.weight"}
    assert not optimizer.state
    everything = [name for name, _ in model.named_parameters()]
    assert 0 < prices.step_seconds(["lm_head.weight"]) < prices.step_seconds(everything)


def make_adaptive(**options):
    model = make_llama()
    return AdaptiveBackprop(model, torch.optim.AdamW(model.parameters(), lr=1e-3), **options)


def test_training_keeps_budgets_of_seconds_and_bytes(rates_known, prices):
    batches = make_batches(2)
    adaptive = make_adaptive(budget_seconds=1.0, budget_memory=30_000)
    assert (adaptive.budget_fraction, adaptive.budget_seconds, adaptive.budget_memory) == (1.0, 1.0, 30_000)
    selection = adaptive.reselect(batches)
    assert 0 < selection.step_bytes == prices.step_bytes(selection.trained) <= 30_000
    assert 0 < selection.step_seconds <= 1.0
    assert selection.trained < {name for name, _ in adaptive._model.named_parameters()}
    assert "1.0 seconds, 30000 bytes" in repr(adaptive)


def test_a_budget_of_seconds_that_trains_nothing_changes_nothing(rates_known):
    adaptive = make_adaptive(budget_seconds=1e-4)
    with pytest.raises(BudgetError, match=r"budget_seconds 0.0001 is too small") as caught:
        adaptive.reselect(make_batches(2))
    assert adaptive.selection is None
    named = caught.value.minimum_budget_seconds
    assert make_adaptive(budget_seconds=named).reselect(make_batches(2)).step_seconds <= named


def test_a_resumed_training_does_not_measure_again(rates_known):
    first = make_adaptive(budget_seconds=1.0)
    selection = first.reselect(make_batches(2))
    state = json.loads(json.dumps(first.state_dict()))
    assert MeasuredRates.from_json(state["rates"]).rates == RATES
    second = make_adaptive(budget_seconds=2.0)
    second.load_state_dict(state)
    assert (second.budget_seconds, len(rates_known)) == (1.0, 1)
    assert second.selection == selection
    second.reselect(make_batches(2))
    assert len(rates_known) == 1


def test_a_resumed_training_keeps_the_budget_of_bytes_that_it_was_saved_with():
    first = make_adaptive(budget_memory=40_000)
    selection = first.reselect(make_batches(2))
    second = make_adaptive(budget_fraction=0.5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.budget_fraction, second.budget_memory) == (1.0, 40_000)
    again = second.reselect(make_batches(2))
    assert (again.trained, again.step_bytes) == (selection.trained, selection.step_bytes)


def test_a_prefix_cache_in_the_models_memory_counts():
    model = make_llama()
    cache = gtcompile.PrefixCache(model, max_bytes=10_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adaptive = AdaptiveBackprop(model, optimizer, budget_memory=10**9, prefix_cache=cache)
    with_cache = adaptive.reselect(make_batches(2))
    without = make_adaptive(budget_memory=10**9).reselect(make_batches(2))
    assert with_cache.trained == without.trained
    assert with_cache.step_bytes - without.step_bytes == 10_000
    cache.remove()


@pytest.mark.parametrize("policy", ["sampled", "last_layers", "progressive", lambda *_: ["lm_head.weight"]])
def test_a_policy_that_cannot_hold_them_is_refused_by_name(policy):
    given = gtcompile.policies.Progressive(steps=5) if policy == "progressive" else policy
    for budget in ({"budget_seconds": 1.0}, {"budget_memory": 10**9}):
        with pytest.raises(ValueError, match='hold with policy="best" alone, got the policy'):
            make_adaptive(policy=given, **budget)


def test_a_fraction_stays_the_budget_when_nothing_else_is_given():
    assert make_adaptive().budget_fraction == 0.5
    assert make_adaptive(budget_fraction=0.7).budget_fraction == 0.7
    assert set(make_adaptive().state_dict()).isdisjoint({"budget_seconds", "budget_memory", "rates"})
