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
from gtcompile.selection.schedule import Schedule
from tests.support.known_costs import shapes_captured_once

BLOCKS = 5


@pytest.fixture(scope="module", autouse=True)
def costs_captured_once():
    with shapes_captured_once():
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


def saved_state(training):
    return json.loads(json.dumps(training[2].state_dict()))


def counted_share(training, flops):
    """Share of the budget's whole that steps took, with the one that is announced."""
    adaptive, whole = training[2], training[2].selection.full_flops
    return (sum(flops) + adaptive.step_fraction * whole) / ((len(flops) + 1) * whole)


def test_the_choice_goes_on_from_a_saved_state():
    training, _ = promised_training()
    state = saved_state(training)
    resumed = make_training(0.5, 4)
    resumed[2].load_state_dict(state)
    assert resumed[2].step_fraction == training[2].step_fraction
    assert resumed[2].history == training[2].history
    assert saved_state(resumed) == state


@pytest.mark.parametrize("after", [0, 5, 9, 15])
@pytest.mark.parametrize("same_objects", [True, False])
def test_what_an_empty_cache_costs_after_a_resumption_is_charged_exactly(after, same_objects):
    """Steps of the resumed epoch compute everything, and the schedule knows of every one."""
    training, batches = promised_training(20)
    selection = training[2].selection
    flops, state = train_epoch(training, batches[:after]), saved_state(training)
    resumed = training if same_objects else make_training(0.5, 4)
    resumed[2].load_state_dict(state)
    resumed[2].prefix_cache.clear()
    charged, charge = [], Schedule.charge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "charge", lambda self, more: charged.append(more) or charge(self, more))
        flops += train_epoch(resumed, batches[after:])
    missed = 20 - after - (after == 0)  # one step of every epoch was expected to be computed again
    assert len(charged) == 20 - after
    assert sum(charged) == missed * saved_by_a_hit(resumed)
    assert max(charged) <= 2 * saved_by_a_hit(resumed)
    one_flop = 1 / selection.full_flops  # of each step; savings are rounded down
    assert resumed[2].spent_fraction == pytest.approx(counted_share(resumed, flops), rel=0, abs=one_flop)


def saved_by_a_hit(training):
    """FLOPs of the forward of the blocks that the selection keeps."""
    adaptive = training[2]
    return sum(adaptive._prefix.block_flops[: adaptive.selection.kept_blocks])


def test_a_step_that_was_not_announced_as_done_before_saving_is_charged_once():
    training, batches = promised_training(4)
    model, optimizer, adaptive = training
    adaptive.prefix_cache.clear()
    for batch in batches[:2]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = saved_state(training)
        adaptive.step()
    resumed = make_training(0.5, 4)
    resumed[2].load_state_dict(state)
    resumed[2].step()
    assert saved_state(resumed)["schedule"] == saved_state(training)["schedule"]
    assert saved_state(resumed)["prefix"] == saved_state(training)["prefix"]


def test_a_cache_of_unknown_examples_is_not_counted_on_after_a_resumption():
    """The objects have seen other examples; the first steps of the epoch ran elsewhere."""
    elsewhere, batches = make_training(0.5, 4), make_batches(8)
    elsewhere[2].reselect(batches)
    train_epoch(elsewhere, batches[:6])
    here, others = make_training(0.5, 4), make_batches(24, seed=1)
    here[2].reselect(others)
    train_epoch(here, others)
    here[2].load_state_dict(saved_state(elsewhere))
    train_epoch(here, batches[6:])
    assert here[2].prefix_cache.held_blocks(8) > 0  # these lookups were of the other examples
    assert here[2].reselect(batches).saved_flops == 0
    train_epoch(here, batches)
    assert here[2].reselect(batches).saved_flops > 0


def test_an_epoch_that_runs_here_as_a_whole_fills_the_cache_after_a_resumption():
    training, batches = make_training(0.5, 4), make_batches(8)
    training[2].reselect(batches)
    training[2].load_state_dict(saved_state(training))
    train_epoch(training, batches)
    assert training[2].reselect(batches).saved_flops > 0


def test_a_state_without_the_forwards_of_its_epoch_counts_from_when_it_is_loaded():
    training, batches = promised_training(20)
    train_epoch(training, batches[:15])
    state = saved_state(training)
    del state["epochs"]
    for key in ("forwards", "steps", "uses", "charged"):
        del state["prefix"][key]
    resumed = make_training(0.5, 4)
    resumed[2].load_state_dict(state)
    charged = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "charge", lambda self, more: charged.append(more))
        train_epoch(resumed, batches[15:])
    assert sum(charged) == 4 * saved_by_a_hit(resumed)  # one is taken for a comparison


@pytest.mark.parametrize(
    ("saved", "epochs", "message"),
    [
        (4, None, "spends what its prefix cache saves; give prefix_cache and epochs=4 here"),
        (4, 5, "with epochs=4, and here are epochs=5; give the same"),
        (None, 4, "with epochs=None, and here are epochs=4; give the same"),
    ],
)
def test_the_state_of_a_training_with_other_epochs_is_refused(saved, epochs, message):
    training = make_training(0.5, saved)
    training[2].reselect(make_batches(4))
    other = make_training(0.5, epochs)
    before = saved_state(other)
    with pytest.raises(ValueError, match=message):
        other[2].load_state_dict(saved_state(training))
    assert saved_state(other) == before


def test_an_earlier_state_that_fills_the_cache_is_refused_without_epochs():
    training = make_training(0.5, 4)
    assert training[2].reselect(make_batches(4)).saved_flops == 0
    state = saved_state(training)
    state.pop("epochs", None)
    with pytest.raises(ValueError, match="give prefix_cache and the same epochs here"):
        make_training(0.5, None)[2].load_state_dict(state)
    make_training(0.5, 4)[2].load_state_dict(state)


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
