"""Numbers that a loss reads from tensors: one run records them, and the trace holds no values."""

import pytest
import torch
from torch import nn

from gtcompile import backward_costs
from gtcompile.capture import strategies
from gtcompile.capture.recorded_reads import RecordingMode, depends_on_values
from gtcompile.graph.flops import count_flops

aten = torch.ops.aten


class Logged:
    """A loss that reads numbers for a log, and selects rows and a branch by values."""

    def __init__(self) -> None:
        self.log: list[float] = []

    @torch.compiler.disable
    def __call__(self, model, x):
        y = model(x)
        self.log.append(y.mean().item())
        chosen = y[x[:, 0] > 0]
        self.log.append(len(chosen))
        return chosen.square().mean() if x.sum() > 0 else (y @ y.t()).mean()


@pytest.fixture
def no_values(monkeypatch):
    def fail(*_):
        raise AssertionError("traced with the values of all tensors")

    monkeypatch.setattr(strategies, "WITH_VALUES", strategies.Strategy(name="", sentence="", run=fail))


@pytest.mark.parametrize("sign", [1, -1])
def test_costs_follow_what_a_loss_reads_without_holding_values(no_values, sign):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), sign * torch.randn(6, 5).abs()
    costs = backward_costs(model, x, loss_fn=Logged())
    assert costs.follows_values
    with count_flops() as counter:
        Logged()(model, x).backward()
    assert costs.full_flops == counter.get_total_flops()


def test_buffers_and_batch_are_as_before_after_the_recorded_run(no_values):
    model, x = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), torch.randn(6, 5)
    buffers, batch = {n: b.clone() for n, b in model.named_buffers()}, x.clone()
    backward_costs(model, x, loss_fn=Logged())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(x, batch)


def test_only_masks_make_an_index_depend_on_values():
    x = torch.ones(3)
    assert depends_on_values(aten.index.Tensor, (x, [x > 0]))
    assert not depends_on_values(aten.index.Tensor, (x, [torch.tensor([0])]))
    assert depends_on_values(aten._local_scalar_dense.default, (x[0],))
    assert not depends_on_values(aten.mul.Tensor, (x, x))


def test_what_is_recorded_holds_no_memory():
    with RecordingMode() as recording:
        x = torch.arange(4.0)
        assert x[x > 1].sum().item() == 5
    (_, _, selected), (_, _, total) = recording.reads
    assert selected.is_meta
    assert (selected.shape, total) == ((2,), 5)
