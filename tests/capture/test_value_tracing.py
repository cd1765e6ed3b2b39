"""Models that branch on data: a batch costs what is predicted for it, and none of its values is kept."""

import gc
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gtcompile import (
    AdaptiveBackprop,
    BackwardCosts,
    CaptureError,
    backward_costs,
    compile_blocks,
    train_only,
)
from gtcompile.capture.capture import capture
from gtcompile.capture.value_tracing import NoMemoryAccess, ValuesMode
from gtcompile.graph.flops import count_flops
from gtcompile.graph.joint_graph import ONE_BATCH
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import random_sets

ROWS, WIDTH = 7, 11


@torch.library.custom_op("gtcompile_tests::positive_rows", mutates_args=())
def positive_rows(x: torch.Tensor) -> torch.Tensor:
    """An operator without a fake kernel, with a result whose size depends on data."""
    return x[x[:, 0] > 0]


def spread(context, gradient):
    (x,) = context.saved_tensors
    return x.new_zeros(x.shape).index_put((x[:, 0] > 0,), gradient)


positive_rows.register_autograd(
    spread, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Branch(nn.Module):
    """Which layer runs, and how wide it is, depends on the sign of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        return self.wide(x)[:, :WIDTH] if x.sum() > 0 else self.narrow(x)


class Layer(nn.Module):
    """A linear layer, and a function that decides on what it is applied to."""

    def __init__(self, decide) -> None:
        super().__init__()
        self.linear, self.decide = nn.Linear(WIDTH, WIDTH), decide

    def forward(self, x):
        return self.decide(self.linear, x)


def repeated(linear, x):
    for _ in range(int((x[:, 0] > 0).sum())):
        x = torch.tanh(linear(x))
    return x


def by_expert(linear, x):
    sizes = torch.stack([x[:, 0] <= 0, x[:, 0] > 0]).sum(1).tolist()
    few, many = x.split(sizes)
    return torch.cat([linear(few), linear(linear(many))])


def from_list(linear, x):
    counts = torch.tensor([(x[:, 0] > 0).sum(), (x[:, 1] > 0).sum()])
    return linear(linear(x)) if counts.sum() > ROWS else linear(x)


def sometimes(linear, x):
    twice = torch.rand(()).item() + random.random() + np.random.rand() > 1.5
    return linear(linear(x)) if twice else linear(x)


LAYERS = {
    "branch": Branch,
    "loop": lambda: Layer(repeated),
    "mask": lambda: Layer(lambda linear, x: linear(x[x[:, 0] > 0])),
    "nonzero": lambda: Layer(lambda linear, x: linear(x[(x[:, 0] > 0).nonzero().squeeze(1)])),
    "sizes": lambda: Layer(by_expert),
    "a tensor of a list of tensors": lambda: Layer(from_list),
    "random numbers": lambda: Layer(sometimes),
    "no fake kernel": lambda: Layer(lambda linear, x: linear(positive_rows(x))),
}


class Model(nn.Module):
    """Two such layers between two that always run; counts its calls in a buffer and remembers the last."""

    def __init__(self, make_layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(make_layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = x = self.inner(x) + 2 * x
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


def batch(sign: int, seed: int = 1) -> dict[str, torch.Tensor]:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {"x": sign * (x + 0.5)}


def seeded() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def counted(run: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    run.zero_grad()
    seeded()
    with count_flops() as counter:
        run(**inputs).backward()
    return counter.get_total_flops()


def costs_of_batch(model: nn.Module, inputs: dict[str, torch.Tensor]) -> BackwardCosts:
    seeded()
    return backward_costs(model, inputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_predicted_for_a_batch_is_counted_whichever_way_it_takes(kind):
    model = Model(LAYERS[kind])
    totals = set()
    for sign in (1, -1):
        costs = costs_of_batch(model, batch(sign))
        assert costs.follows_values
        for trained in random_sets(sorted(costs.fqns), 3):
            train_only(model, trained)
            assert counted(model, batch(sign)) == costs.step_flops(trained)
        totals.add(costs.full_flops)
    assert len(totals) == 2 or kind == "random numbers"


@pytest.mark.parametrize("scope", ["whole", "blocks"])
@pytest.mark.parametrize("kind", ["branch", "mask"])
def test_compiled_models_take_what_is_predicted_and_have_eager_gradients(kind, scope):
    model = Model(LAYERS[kind])
    run = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    if scope == "blocks":
        run = compile_blocks(model, compiler="eager")
    for sign in (1, -1):
        costs = costs_of_batch(run, batch(sign))
        for trained in random_sets(sorted(costs.fqns), 2):
            train_only(run, trained)
            counted(run, batch(sign))  # a region learns here what is differentiated
            assert counted(run, batch(sign)) == costs.step_flops(trained)
            assert_same_gradients(model, reference_gradients(run, batch(sign)))


def test_a_parameter_that_this_batch_does_not_use_cannot_be_selected():
    costs = backward_costs(Model(Branch), batch(1))
    statuses = {p.fqn: p.status for p in costs.parameters}
    assert (statuses["layers.0.wide.bias"], statuses["layers.0.narrow.bias"]) == ("selectable", "unused")


def test_all_sizes_in_the_graph_are_those_of_the_batch():
    joint = capture(Model(LAYERS["mask"]), batch(1))
    values = [node.meta["val"] for node in joint.module.graph.nodes if "val" in node.meta]
    sizes = {size for value in values if isinstance(value, torch.Tensor) for size in value.shape}
    assert joint.source == ONE_BATCH
    assert {type(size) for size in sizes} == {int}


def real_tensors_of_width() -> int:
    """How many tensors with values have the width of these models in some dimension."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    return sum(WIDTH in tensor.shape or 3 * WIDTH in tensor.shape for tensor in tensors)


def test_no_values_are_kept_with_the_graph():
    model, inputs = Model(Branch), batch(1)
    capture(model, inputs)  # whatever is made once
    before = real_tensors_of_width()
    joint = capture(model, inputs)
    assert real_tensors_of_width() == before
    assert joint.source == ONE_BATCH


def test_a_mode_that_has_forgotten_its_values_is_a_fake_mode_like_any_other():
    mode = ValuesMode()
    x = mode.from_tensor(torch.ones(2))
    assert (x.sum() * 3).item() == 6
    mode.forget()
    assert (x + 1).shape == (2,)
    with pytest.raises(Exception, match="local_scalar_dense"):
        x.sum().item()


def test_nothing_in_the_model_changes():
    model, inputs = Model(LAYERS["random numbers"]), batch(1)
    model(**inputs).backward()
    seeded()
    before, kept = random.getstate(), model.last
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    assert capture(model, inputs).source == ONE_BATCH
    assert model.last is kept
    assert random.getstate() == before
    assert np.random.rand() == np.random.RandomState(3).rand()
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(map(torch.equal, gradients, [parameter.grad for parameter in model.parameters()]))


def test_without_weights_the_reason_and_what_would_do_are_told():
    with torch.device("meta"):
        model = Model(LAYERS["sizes"])
    with pytest.raises(CaptureError, match="real weights") as raised:
        capture(model, batch(1))
    assert "depends on data" in str(raised.value)


def test_an_error_in_the_forward_is_told_beside_the_other_reasons():
    def fails(linear, x):
        raise RuntimeError("too cold" if x.sum().item() > 0 else "too warm")

    with pytest.raises(CaptureError, match="too warm") as raised:
        capture(Model(lambda: Layer(fails)), batch(-1))
    assert "real weights" not in str(raised.value)


def test_every_selection_costs_the_way_its_own_batch_takes():
    model = Model(Branch)
    adaptive = AdaptiveBackprop(model, torch.optim.SGD(model.parameters(), lr=0.01), budget_fraction=0.8)
    for sign in (1, -1, 1):
        batches = [batch(sign, seed) for seed in (1, 2)]
        selection = adaptive.reselect(batches)
        assert counted(model, batches[0]) == selection.step_flops
        assert selection.full_flops == backward_costs(model, batches[0]).full_flops


class Transcriber(nn.Module):
    """CTC loss on lengths that it is given, as tensors or as numbers."""

    def __init__(self, lengths, by_keyword: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.lengths, self.by_keyword = nn.Linear(WIDTH, 5), lengths, by_keyword

    def forward(self, x, labels):
        log_probs = torch.log_softmax(self.linear(x), -1)
        if not self.by_keyword:
            return nn.CTCLoss()(log_probs, labels, *self.lengths)
        named = dict(zip(("input_lengths", "target_lengths"), self.lengths, strict=True))
        return nn.functional.ctc_loss(log_probs, labels, **named)


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("kind", [tuple, list, torch.tensor])
def test_lengths_of_sequences_may_be_numbers_or_tensors(kind, by_keyword):
    model = Transcriber([kind([9, 7]), kind([3, 2])], by_keyword)
    inputs = {"x": torch.randn(9, 2, WIDTH), "labels": torch.randint(1, 5, (2, 3))}
    costs = backward_costs(model, inputs)
    assert counted(model, inputs) == costs.full_flops
    expected = torch.autograd.grad(model(**inputs), list(model.parameters()))
    with NoMemoryAccess():
        loss = model(**inputs)
    assert loss == model(**inputs)
    assert all(map(torch.equal, torch.autograd.grad(loss, list(model.parameters())), expected))


FEATURES = 4
RECURRENT = {
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
        self.inner = nn.Linear(FEATURES, FEATURES)
        self.layer = RECURRENT[kind](FEATURES, FEATURES, batch_first=batch_first, **settings)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.inner(x), lengths, self.batch_first, enforce_sorted=False)
        output, hidden = self.layer(packed)
        padded, ends = pad_packed_sequence(output, self.batch_first, 0.5, self.total_length)
        hidden = hidden if isinstance(hidden, torch.Tensor) else torch.cat(hidden, dim=-1)
        return padded.square().mean() + hidden.square().mean() + ends.sum()


@st.composite
def recurrent_models(draw: st.DrawFn) -> tuple[Recurrent, dict[str, torch.Tensor]]:
    """A model and a batch of its kind."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    batch_first = draw(st.booleans())
    torch.manual_seed(0)
    model = Recurrent(
        draw(st.sampled_from(sorted(RECURRENT))),
        batch_first,
        draw(st.sampled_from([None, 7])),
        num_layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    x = torch.randn(len(lengths), max(lengths), FEATURES)
    return model, {"x": x if batch_first else x.transpose(0, 1), "lengths": torch.tensor(lengths)}


@settings(max_examples=40)
@given(recurrent_models())
def test_packed_sequences_in_operators_are_what_torch_computes(drawn) -> None:
    model, batch = drawn
    expected = model(**batch)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    with NoMemoryAccess():
        loss = model(**batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted)


@settings(max_examples=3)
@given(recurrent_models())
def test_costs_of_packed_sequences_are_exact_for_any_trained_set(drawn) -> None:
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
    x = torch.randn(2, 5, FEATURES)
    long, short = (backward_costs(model, {"x": x, "lengths": torch.tensor([5, end])}) for end in (5, 2))
    assert short.full_flops < long.full_flops


def test_a_recurrent_layer_over_padded_sequences_is_left_to_torch() -> None:
    layer, x = nn.GRU(FEATURES, FEATURES), torch.randn(3, 2, FEATURES)
    with NoMemoryAccess():
        output, _ = layer(x)
    torch.testing.assert_close(output, layer(x)[0], rtol=0, atol=0)
