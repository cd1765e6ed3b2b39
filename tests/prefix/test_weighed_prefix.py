"""AdaptiveBackprop that spends what its prefix cache saves: FLOPs of whole epochs, predicted and counted."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import gtcompile
from gtcompile.graph.flops import count_flops
from gtcompile.training.step_costs import CostsByShape

BLOCKS = 5


@pytest.fixture(scope="module", autouse=True)
def costs_captured_once():
    """A capture takes most of a short test; equal models have equal costs."""
    known, capture = {}, CostsByShape._capture

    def remembered(self, batch, budget_of):
        key = self._blocks, tuple(batch["input_ids"].shape)
        if key not in known:
            known[key] = capture(self, batch, budget_of)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CostsByShape, "_capture", remembered)
        yield


def make_training(budget=0.6, epochs=4, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=24,
        num_key_value_heads=1, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    defaults = {"prefix_cache": True, "epochs": epochs}
    return model, optimizer, gtcompile.AdaptiveBackprop(model, optimizer, budget, **defaults | options)


def make_batches(count, rows=2, tokens=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(3, 61, (count, rows, tokens), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in data]


def train_epoch(training, batches, seed=0):
    """One epoch in another order; the FLOPs of each of its steps, counted."""
    model, optimizer, adaptive = training
    flops = []
    for batch in random.Random(seed).sample(batches, len(batches)):
        with count_flops() as counter:
            model(**batch).loss.backward()
        flops.append(counter.get_total_flops())
        optimizer.step()
        optimizer.zero_grad()
        adaptive.step()
    return flops


@settings(max_examples=5, deadline=None)
@given(budget=st.floats(0.45, 0.9), epochs=st.integers(2, 4), count=st.integers(2, 5))
def test_the_mean_of_every_epoch_is_as_predicted_and_within_the_budget(budget, epochs, count):
    training, batches = make_training(budget, epochs), make_batches(count)
    adaptive = training[2]
    spent = whole = 0
    for epoch in range(epochs):
        selection = adaptive.reselect(batches)
        assert adaptive.step_fraction == selection.step_fraction <= budget
        flops = train_epoch(training, batches, epoch)
        spent, whole = spent + sum(flops), whole + count * selection.full_flops
        assert sum(flops) <= count * selection.step_flops <= count * selection.budget_flops
        everything = adaptive.step_flops
        if not selection.saved_flops:
            assert flops == [everything] * count
        elif epoch == 1:  # the first step that finds its examples is computed again
            assert sorted(flops) == [adaptive.cached_step_flops] * (count - 1) + [everything]
            assert count * selection.step_flops - sum(flops) < count  # rounded up to whole FLOPs
        else:
            assert flops == [adaptive.cached_step_flops] * count
    assert adaptive.computed_fraction == pytest.approx(spent / whole)


def test_later_epochs_train_more_within_the_same_budget():
    training, batches = make_training(0.5, 4), make_batches(8)
    selections = []
    for epoch in range(4):
        selections.append(training[2].reselect(batches))
        train_epoch(training, batches, epoch)
    whole = [selection.step_flops + selection.saved_flops for selection in selections]
    assert selections[0].saved_flops == 0 < selections[0].kept_blocks
    assert max(whole[1:]) > selections[0].budget_flops >= whole[0]
    assert "to fill the prefix cache" in str(selections[0])
    assert any("kept in the prefix cache" in str(selection) for selection in selections[1:])


def promised_training(count=8):
    """A training in its second epoch, whose selection relies on cached values."""
    training, batches = make_training(0.5, 4), make_batches(count)
    training[2].reselect(batches)
    train_epoch(training, batches)
    assert training[2].reselect(batches).saved_flops
    return training, batches


def test_steps_whose_examples_are_new_are_paid_for_by_cheaper_steps():
    training, _ = promised_training()
    flops, budget = train_epoch(training, make_batches(24, seed=1)), training[2].selection.budget_flops
    assert flops[0] > budget  # nobody could know
    assert min(flops) < budget
    excess = max(flops) - budget
    for steps in range(1, 25):
        assert sum(flops[:steps]) <= steps * budget + 2 * excess
    assert training[2].spent_fraction <= 0.5


def test_an_epoch_with_few_new_examples_keeps_the_mean():
    training, batches = promised_training(16)
    selection = training[2].selection
    flops = train_epoch(training, batches[:14] + make_batches(2, seed=1))
    assert sum(flops) <= 16 * selection.budget_flops + selection.saved_flops


def test_without_room_for_all_examples_nothing_is_spent():
    batches = make_batches(8)
    torch.manual_seed(0)
    training = make_training(0.5, 4)
    training[2].prefix_cache._max_bytes = 2000
    for epoch in range(3):
        assert training[2].reselect(batches).saved_flops == 0
        train_epoch(training, batches, epoch)


def test_the_choice_goes_on_from_a_saved_state():
    training, batches = promised_training()
    state = json.loads(json.dumps(training[2].state_dict()))
    resumed = make_training(0.5, 4)
    resumed[2].load_state_dict(state)
    assert resumed[2].step_fraction == training[2].step_fraction
    assert resumed[2].history == training[2].history
    # its cache is empty, so that all steps compute everything, and cheaper sets pay for it
    flops = train_epoch(resumed, batches * 3)
    assert sum(flops[3:]) <= len(flops[3:]) * training[2].selection.budget_flops
    with pytest.raises(ValueError, match="spends what its prefix cache saves; give prefix_cache and"):
        make_training(0.5, None)[2].load_state_dict(state)


def test_without_epochs_selections_do_not_know_the_cache():
    batches = make_batches(4)
    trained = []
    for cached in (True, False):
        training = make_training(0.6, None, prefix_cache=cached)
        for epoch in range(2):
            training[2].reselect(batches)
            train_epoch(training, batches, epoch)
        trained.append([(s.trained, s.kept_blocks, s.planned_bound) for s in training[2].history])
    assert trained[0] == trained[1]
    assert trained[0][0][1:] == (0, None)


def test_more_importances_are_measured_where_savings_can_pay_for_more():
    asked = {}
    for epochs in (None, 3):
        training = make_training(0.5, epochs)
        training[2].reselect(make_batches(2))
        asked[epochs] = set(training[2].importance)
    assert asked[None] < asked[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "expected epochs as a number of at least 1, got 0"),
        ({"epochs": 1.5}, "expected epochs as a number of at least 1, got 1.5"),
        ({"epochs": True}, "expected epochs as a number of at least 1, got True"),
        ({"prefix_cache": False}, "give prefix_cache=True as well"),
        ({"policy": "last_layers"}, 'epochs work with policy="best" alone'),
    ],
)
def test_what_cannot_be_weighed_is_refused_by_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        make_training(**options)
