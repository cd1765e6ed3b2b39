"""State of frozen parameters: kept bit for bit, moved, or dropped and started anew."""

import copy

import pytest
import torch
from torch import nn

from gtcompile import AdaptiveBackprop, train_only
from gtcompile.state import host_memory
from gtcompile.state.optimizer_state import FrozenState
from tests.support.models import Regression, make_batch, step
from tests.support.optimizers import state_bytes

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
}


def make(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return model, OPTIMIZERS[kind](model.parameters())


def run(model, optimizer, steps=1):
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("setting", ["keep", "cpu"])
def test_state_is_the_same_bits_after_a_stretch_of_being_frozen(kind, setting):
    model, optimizer = make(kind)
    frozen = FrozenState(optimizer, setting)
    run(model, optimizer, 2)
    weight = model[0].weight
    before, value = copy.deepcopy(optimizer.state[weight]), weight.detach().clone()
    train_only(model, ["1.*"])
    frozen.apply()
    run(model, optimizer, 2)
    assert torch.equal(weight, value)
    train_only(model, None)
    frozen.apply()
    assert_same_state(optimizer.state[weight], before)
    run(model, optimizer)
    assert not torch.equal(weight, value)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dropped_state_is_gone_and_starts_anew(kind):
    model, optimizer = make(kind)
    frozen = FrozenState(optimizer, "drop")
    run(model, optimizer, 2)
    kept = state_bytes(optimizer, model[1].weight)
    train_only(model, ["1.*"])
    frozen.apply()
    assert state_bytes(optimizer, model[0].weight) == 0
    assert state_bytes(optimizer, model[1].weight) == kept > 0
    train_only(model, None)
    frozen.apply()
    run(model, optimizer)
    if "step" in optimizer.state[model[0].weight]:
        assert optimizer.state[model[0].weight]["step"] == 1
        assert optimizer.state[model[1].weight]["step"] == 3


def test_state_is_moved_for_frozen_parameters_alone(monkeypatch):
    monkeypatch.setattr(host_memory, "HOST", torch.device("meta"))  # a host that differs from the device
    model, optimizer = make("AdamW")
    run(model, optimizer)
    train_only(model, ["1.*"])
    FrozenState(optimizer, "cpu").apply()
    places = {n: optimizer.state[p]["exp_avg"].device.type for n, p in model.named_parameters()}
    assert places == {"0.weight": "meta", "0.bias": "meta", "1.weight": "cpu", "1.bias": "cpu"}
    assert optimizer.state[model[0].weight]["step"].device.type == "cpu"


@pytest.mark.parametrize("setting", ["keep", "cpu", "drop"])
def test_learning_rate_schedules_go_on_as_ever(setting):
    model, optimizer = make("AdamW")
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
    rates = []
    for trained in (None, ["1.*"], ["0.*"], None):
        train_only(model, trained)
        FrozenState(optimizer, setting).apply()
        run(model, optimizer)
        schedule.step()
        rates += schedule.get_last_lr()
    assert rates == pytest.approx([0.0775, 0.055, 0.0325, 0.01])


def test_an_unknown_setting_is_refused():
    model, optimizer = make("SGD")
    with pytest.raises(ValueError, match='expected frozen_state "keep", "cpu" or "drop"'):
        AdaptiveBackprop(model, optimizer, 0.5, frozen_state="disk")


@pytest.mark.parametrize("setting", ["keep", "drop"])
def test_bytes_of_gradients_and_state_are_those_of_the_trained_and_the_kept(setting):
    torch.manual_seed(0)
    model = Regression(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adaptive = AdaptiveBackprop(model, optimizer, 0.7, frozen_state=setting)
    ever = set()
    for _ in range(2):
        trained = adaptive.reselect([make_batch(), make_batch()]).trained
        optimizer.zero_grad()
        step(model, make_batch())
        optimizer.step()
        ever |= trained
    parameters = dict(model.named_parameters())
    gradient_bytes = sum(p.grad.nbytes for p in parameters.values() if p.grad is not None)
    state = {name: state_bytes(optimizer, p) for name, p in parameters.items()}
    assert gradient_bytes == bytes_of(parameters, trained)
    assert sum(state[name] for name in trained) == 2 * bytes_of(parameters, trained)
    kept = set() if setting == "drop" else ever - trained
    assert sum(state[name] for name in state.keys() - trained) == 2 * bytes_of(parameters, kept)


def bytes_of(parameters, names):
    return sum(parameters[name].nbytes for name in names)
