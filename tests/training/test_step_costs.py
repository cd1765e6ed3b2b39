"""Costs of steps at the shapes of their batches: captured for a few, derived for the others, and counted."""

import json
import logging
import random

import pytest
import torch
from torch import nn

import gtcompile
from gtcompile import backward_costs
from gtcompile.graph.flops import count_flops
from gtcompile.training import step_costs
from gtcompile.training.step_costs import CostsByShape

WIDTH = 6


class Attention(nn.Module):
    """A loss of values [rows, length, WIDTH] with products of lengths and of widths."""

    def __init__(self):
        super().__init__()
        self.keys, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, values):
        keys = self.keys(values)
        return self.head((keys @ keys.mT).softmax(-1) @ keys).square().mean()


class InChunks(Attention):
    """The same on lengths rounded up to a multiple of 8, so that FLOPs are no polynomial in the length."""

    def forward(self, values):
        return super().forward(nn.functional.pad(values, (0, 0, 0, -values.shape[1] % 8)))


@pytest.fixture
def captured(monkeypatch):
    """The batches that were captured."""
    batches = []

    def note(model, batch, **options):
        batches.append(batch)
        return backward_costs(model, batch, **options)

    monkeypatch.setattr(step_costs, "backward_costs", note)
    return batches


def batch(length, rows=2):
    return {"values": torch.randn(rows, length, WIDTH)}


def test_a_few_lengths_are_captured_and_the_costs_at_all_others_follow_exactly(captured):
    model = Attention()
    costs = CostsByShape(model, None)
    for length in (4, 9, 5, 30, 17, 4, 21, 1):
        assert costs.of(batch(length), "step").costs == backward_costs(model, batch(length))
    assert [each["values"].shape[1] for each in captured] == [4, 9, 5, 30]  # the fourth one confirms
    for length, rows in [(4, 3), (7, 3), (11, 5), (2, 4), (13, 7)]:
        assert costs.of(batch(length, rows), "step").costs == backward_costs(model, batch(length, rows))
    assert len(captured) <= 4 + 4


def test_costs_that_do_not_follow_are_captured_and_past_a_limit_a_mean_with_a_warning(
    captured, monkeypatch, caplog
):
    monkeypatch.setattr(step_costs, "MOST_CAPTURES", 6)
    model = InChunks()
    costs = CostsByShape(model, None)
    for length in (1, 9, 17, 20, 40, 33):
        assert costs.of(batch(length), "step").costs == backward_costs(model, batch(length))
    assert len(captured) == 6
    with caplog.at_level(logging.WARNING):
        mean = costs.of(batch(56), "step").costs.full_flops
    assert "counts as the mean of these" in caplog.text
    sizes = [costs.of(each, "step").costs.full_flops for each in captured]
    assert mean == round(sum(sizes) / 6)


def test_the_budget_is_of_the_mean_step_and_counted_steps_are_exact():
    torch.manual_seed(0)
    model = Attention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, 0.8, policy="last_layers")
    epoch = [batch(length) for length in random.Random(0).choices(range(1, 30), k=12)]
    selection = adaptive.reselect(epoch)
    flops = [backward_costs(model, each) for each in epoch]
    whole = sum(each.full_flops for each in flops)
    assert selection.full_flops == round(whole / len(epoch))
    assert adaptive.counted_fraction is None
    counted = 0
    for each in epoch:
        with count_flops() as counter:
            model(**each).backward()
        counted += counter.get_total_flops()
        assert adaptive.count(each).step_flops == counter.get_total_flops()
        optimizer.step()
        optimizer.zero_grad()
        adaptive.step()
    assert adaptive.counted_fraction == counted / whole <= 0.8
    state = json.loads(json.dumps(adaptive.state_dict()))
    resumed = gtcompile.AdaptiveBackprop(model, optimizer, 0.8, policy="last_layers")
    resumed.load_state_dict(state)
    assert resumed.counted_fraction == adaptive.counted_fraction


def test_batches_like_those_of_the_training_decide_the_costs_where_shapes_differ():
    model = Attention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, 0.8, policy="last_layers")
    selection = adaptive.reselect([batch(20), batch(24)], like=[batch(4)])
    assert selection.full_flops == backward_costs(model, batch(4)).full_flops
    selection = adaptive.reselect([batch(20), batch(20)], like=[batch(4)])
    assert selection.full_flops == backward_costs(model, batch(20)).full_flops


def test_costs_of_a_batch_need_a_selection():
    model = Attention()
    adaptive = gtcompile.AdaptiveBackprop(model, torch.optim.AdamW(model.parameters()), 0.8)
    with pytest.raises(gtcompile.GTCompileError, match="call reselect"):
        adaptive.count(batch(4))
