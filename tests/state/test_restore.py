"""What a forward changes on the side is put back, also when it fails."""

import pytest
import torch
from torch import nn

from gtcompile import train_only, trained_parameters
from gtcompile.state.restore import restored, temporarily_training


def test_random_numbers_drawn_within_are_drawn_again_after():
    with restored(nn.Linear(2, 2)):
        within = torch.rand(1)
    assert torch.equal(torch.rand(1), within)


def test_buffers_keep_their_identity_and_values_whether_written_or_replaced():
    module = nn.Module()
    module.register_buffer("written", torch.ones(2))
    module.register_buffer("replaced", torch.ones(2))
    module.register_buffer("absent", None)
    written, replaced = module.written, module.replaced
    with pytest.raises(KeyboardInterrupt), restored(module):  # noqa: PT012 - the interruption comes last
        module.written.add_(1)
        module.replaced = module.replaced + 1
        module.absent = torch.ones(1)
        raise KeyboardInterrupt
    assert module.written is written
    assert module.replaced is replaced
    assert module.absent is None
    assert written.tolist() == replaced.tolist() == [1.0, 1.0]


def test_accumulated_gradients_are_set_aside_and_come_back_as_the_same_tensors():
    module = nn.Linear(2, 1)
    module.weight.grad = gradient = torch.ones(1, 2)
    with restored(module):
        assert module.weight.grad is None
        module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad is gradient
    assert gradient.tolist() == [[1.0, 1.0]]
    assert module.bias.grad is None


def test_the_trained_set_and_the_gradients_asked_for_come_back_after_a_failure():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    train_only(model, ["1.*"])
    with pytest.raises(RuntimeError), temporarily_training(model, ["0.weight"]):  # noqa: PT012
        assert trained_parameters(model) == {"0.weight"}
        raise RuntimeError
    assert trained_parameters(model) == {"1.weight", "1.bias"}
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
