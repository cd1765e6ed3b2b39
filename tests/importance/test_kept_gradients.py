"""Where gradients are kept between batches does not change what is measured."""

import pytest
import torch
from torch import nn

from gtcompile import measure_importance
from gtcompile.importance import kept_gradients
from gtcompile.importance.estimators import _TOGETHER
from gtcompile.importance.kept_gradients import TEMPORARY, KeptGradients
from gtcompile.state import host_memory

CPU = torch.device("cpu")


def model_and_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model.forward = lambda x: nn.Sequential.forward(model, x).square().mean()
    slow, fast = model[0].parameters(), model[2].parameters()
    return model, torch.optim.AdamW([{"params": slow, "lr": 1e-3}, {"params": fast, "lr": 1e-1}])


def batches(count):
    return [{"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(i))} for i in range(count)]


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("together", [1, _TOGETHER])
@pytest.mark.parametrize("fits", [True, False])
def test_importance_is_the_same_wherever_gradients_are_and_however_many_are_stepped_at_once(
    monkeypatch, fits, together, two_pass
):
    model, optimizer = model_and_optimizer()
    expected = measure_importance(model, optimizer, batches(3), two_pass=two_pass)
    monkeypatch.setattr(kept_gradients, "fits_beside", lambda device, count: fits)
    monkeypatch.setattr("gtcompile.importance.estimators._TOGETHER", together)
    assert measure_importance(model, optimizer, batches(3), two_pass=two_pass) == expected
    assert abs(expected["2.weight"]) > 10 * abs(expected["0.weight"])  # each has the rate of its own group


def test_all_gradients_or_none_stay_on_the_device(monkeypatch):
    asked = []

    def refuse(device, count):
        asked.append((device, count))
        return False

    moved = []
    monkeypatch.setattr(kept_gradients, "fits_beside", refuse)
    monkeypatch.setattr(kept_gradients, "to_host", lambda value: moved.append(value) or value.clone())
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    kept = KeptGradients(parameters)
    for name, parameter in zip("ab", parameters, strict=True):
        kept.put(name, parameter.detach())
    assert asked == [(CPU, (5 + TEMPORARY * 3) * 4)]
    assert len(moved) == len(kept) == 2
    assert kept.take("b", CPU).tolist() == [1.0, 1.0, 1.0]
    kept.drop(["a", "b"])
    assert "a" not in kept


@pytest.mark.parametrize(("count", "fits"), [(40, True), (60, False)])
def test_what_fits_beside_is_what_is_free_or_unused_less_some_spare(monkeypatch, count, fits):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert host_memory.fits_beside(torch.device("cuda"), count) is fits


def test_host_memory_has_room_and_other_devices_do_not():
    assert host_memory.fits_beside(CPU, 1 << 60)
    assert not host_memory.fits_beside(torch.device("meta"), 1)
