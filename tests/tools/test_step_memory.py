"""Measured memory of forward and backward: what is known by hand, and nothing left behind."""

import torch
from torch import nn

from gtcompile.tools.common.step_memory import passes_memory, peak_bytes, saved_bytes

CPU = torch.device("cpu")
ROWS, WIDTH, FLOAT = 5, 64, 4


class Stack(nn.Module):
    """Two layers without biases: a layer's backward reads its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)).sum()


def test_saved_bytes_are_the_inputs_of_trained_layers_and_the_peak_holds_their_gradients():
    model, batch = Stack(), {"x": torch.randn(ROWS, WIDTH)}
    both = passes_memory(model, batch, CPU)
    assert both.saved == 2 * ROWS * WIDTH * FLOAT
    assert both.peak >= 2 * WIDTH * WIDTH * FLOAT
    model.first.weight.requires_grad_(False)
    last = passes_memory(model, batch, CPU)
    assert last.saved == ROWS * WIDTH * FLOAT
    assert last.peak < 2 * WIDTH * WIDTH * FLOAT


def test_gradients_and_random_numbers_are_what_they_were():
    model, batch = Stack(), {"x": torch.randn(ROWS, WIDTH)}
    model(**batch).backward()
    before, state = model.first.weight.grad, torch.get_rng_state()
    kept = before.clone()
    passes_memory(model, batch, CPU)
    assert model.first.weight.grad is before
    assert torch.equal(before, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    batch = torch.ones(3, 4)
    # the input, saved by the first layer, and the sigmoid's output, saved by it and by the second layer
    assert saved_bytes(lambda: model(batch).sum(), model) == 4 * (3 * 4 + 3 * 8)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    assert saved_bytes(lambda: model(batch).sum(), model) == 4 * 3 * 8


def test_the_peak_is_what_is_held_at_once() -> None:
    def hold_one_of_two() -> None:
        for _ in range(2):
            torch.empty(1 << 18)

    def hold_both() -> None:
        kept = [torch.empty(1 << 18) for _ in range(2)]
        del kept

    assert peak_bytes(hold_one_of_two, CPU) == 1 << 20
    assert peak_bytes(hold_both, CPU) == 2 << 20
