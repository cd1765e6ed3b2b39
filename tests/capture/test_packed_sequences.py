"""Packed sequences in operators alone: what torch computes of them, and costs predicted exactly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gtcompile.capture.value_tracing import NoMemoryAccess
from gtcompile.costs.backward_costs import backward_costs
from gtcompile.graph.flops import count_flops
from gtcompile.state.trained_set import train_only
from tests.support.models import random_sets

WIDTH = 4
LAYERS = {
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "lstm, projected": lambda *args, **named: nn.LSTM(*args, proj_size=3, **named),
    "rnn, tanh": nn.RNN,
    "rnn, relu": lambda *args, **named: nn.RNN(*args, nonlinearity="relu", **named),
}


class Recurrent(nn.Module):
    """A recurrent layer over sequences of several lengths, packed and padded again."""

    def __init__(self, kind: str, batch_first: bool, total_length: int | None, **settings) -> None:
        super().__init__()
        self.batch_first, self.total_length = batch_first, total_length
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.layer = LAYERS[kind](WIDTH, WIDTH, batch_first=batch_first, **settings)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.inner(x), lengths, self.batch_first, enforce_sorted=False)
        output, hidden = self.layer(packed)
        padded, ends = pad_packed_sequence(output, self.batch_first, 0.5, self.total_length)
        hidden = hidden if isinstance(hidden, torch.Tensor) else torch.cat(hidden, dim=-1)
        return padded.square().mean() + hidden.square().mean() + ends.sum()


@st.composite
def models(draw: st.DrawFn) -> tuple[Recurrent, dict[str, torch.Tensor]]:
    """A model and a batch of its kind."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    batch_first = draw(st.booleans())
    torch.manual_seed(0)
    model = Recurrent(
        draw(st.sampled_from(sorted(LAYERS))),
        batch_first,
        draw(st.sampled_from([None, 7])),
        num_layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    x = torch.randn(len(lengths), max(lengths), WIDTH)
    return model, {"x": x if batch_first else x.transpose(0, 1), "lengths": torch.tensor(lengths)}


@settings(max_examples=40)
@given(models())
def test_operators_compute_what_torch_does(drawn) -> None:
    model, batch = drawn
    expected = model(**batch)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    with NoMemoryAccess():
        loss = model(**batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted)


@settings(max_examples=6)
@given(models())
def test_costs_are_exact_for_any_trained_set(drawn) -> None:
    model, batch = drawn
    costs = backward_costs(model, batch)
    assert costs.follows_values
    for trained in random_sets(sorted(costs.fqns), 2):
        train_only(model, trained)
        with count_flops() as counter:
            model(**batch).backward()
        assert costs.step_flops(trained) == counter.get_total_flops()


def test_other_lengths_cost_something_else() -> None:
    torch.manual_seed(0)
    model = Recurrent("gru", True, None)
    x = torch.randn(2, 5, WIDTH)
    long, short = (backward_costs(model, {"x": x, "lengths": torch.tensor([5, end])}) for end in (5, 2))
    assert short.full_flops < long.full_flops


def test_a_recurrent_layer_over_padded_sequences_is_left_to_torch() -> None:
    layer, x = nn.GRU(WIDTH, WIDTH), torch.randn(3, 2, WIDTH)
    with NoMemoryAccess():
        output, _ = layer(x)
    torch.testing.assert_close(output, layer(x)[0], rtol=0, atol=0)
