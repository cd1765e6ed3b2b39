"""AdaptiveBackprop end to end, its state, and failures that change nothing."""

import copy
import json
import logging
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig, OPTForCausalLM

from gtcompile import (
    AdaptiveBackprop,
    BudgetError,
    CaptureError,
    GTCompileError,
    backward_costs,
    measure_importance,
    select_parameters,
    train_only,
    trained_parameters,
)


class Regression(nn.Module):
    """Four layers whose loss depends on all of them."""

    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

    def forward(self, x, y):
        return ((torch.tanh(self.layers(x)) - y) ** 2).mean()


def make_batches(count=3, width=8, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(size, width, generator=generator) for _ in range(count)]
    return [{"x": x, "y": x.flip(1).tanh()} for x in xs]


def make_regression(**options):
    torch.manual_seed(0)
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, AdaptiveBackprop(model, optimizer, **{"budget_fraction": 0.6, **options})


def make_opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    )
    return OPTForCausalLM(config)


def opt_batches(count, size=4, length=16):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randint(4, 60, (size, 1), generator=generator) for _ in range(count)]
    rows = [4 + (start + torch.arange(length)) % 56 for start in starts]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]


def train(model, optimizer, batches):
    """One pass over the batches; the losses and what had a gradient."""
    losses, with_gradient = [], set()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        output = model(**batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        inner = getattr(model, "_orig_mod", model)
        with_gradient |= {fqn for fqn, p in inner.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return losses, with_gradient


COMPILED = {"backend": "gtcompile", "options": {"compiler": "eager"}}


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_transformer_trains_within_the_budget_and_learns(compiled):
    model = make_opt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    runner = torch.compile(model, **COMPILED) if compiled else model
    adaptive = AdaptiveBackprop(runner, optimizer, budget_fraction=0.8)
    all_losses = []
    for _ in range(2):
        batches = opt_batches(3) * 4
        selection = adaptive.reselect(batches[:3])
        assert selection.step_flops <= 0.8 * selection.full_flops
        losses, with_gradient = train(runner, optimizer, batches)
        assert with_gradient == selection.trained == trained_parameters(model)
        all_losses += losses
    assert all_losses[-1] < 0.8 * all_losses[0]
    ever = frozenset().union(*(selection.trained for selection in adaptive.history))
    assert 0 < len(ever) < len(list(model.parameters()))
    assert {fqn for fqn, p in model.named_parameters() if p in optimizer.state} == ever


def test_compiled_and_plain_models_select_and_train_alike():
    def run(compiled):
        model, optimizer, _ = make_regression()
        runner = torch.compile(model, **COMPILED) if compiled else model
        adaptive = AdaptiveBackprop(runner, optimizer, 0.6)
        for epoch in range(3):
            adaptive.reselect(make_batches(seed=epoch))
            train(runner, optimizer, make_batches(seed=9))
        return adaptive.history, [p.tolist() for p in model.parameters()]

    assert run(compiled=True) == run(compiled=False)


def test_a_compiled_model_is_captured_once_however_often_it_is_reselected(monkeypatch):
    import gtcompile.compiler.backend as backend

    captures = []
    region = backend.Region
    monkeypatch.setattr(backend, "Region", lambda *args: captures.append(1) or region(*args))
    torch.compiler.reset()  # what other tests captured of this class would be used again
    model, optimizer, _ = make_regression()
    runner = torch.compile(model, **COMPILED)
    adaptive = AdaptiveBackprop(runner, optimizer, 0.6)
    trained = set()
    for epoch in range(5):
        trained.add(adaptive.reselect(make_batches(seed=epoch)).trained)
        train(runner, optimizer, make_batches(seed=9))
    assert len(trained) > 1
    assert len(captures) == 1


def test_reselecting_is_costs_importance_and_selection_one_after_the_other():
    model, optimizer, adaptive = make_regression(
        budget_fraction=0.8, never=["*.bias"], always=["layers.3.weight"]
    )
    batches = make_batches()
    costs = backward_costs(model, batches[0])
    importance = measure_importance(model, optimizer, batches)
    expected = select_parameters(costs, importance, 0.8, always=["layers.3.weight"], never=["*.bias"])
    selection = adaptive.reselect(batches)
    assert selection.trained == expected.trained == trained_parameters(model)
    assert "layers.3.weight" in selection.trained
    assert adaptive.importance.items() <= importance.items()
    assert adaptive.importance.keys() == {"layers.1.weight", "layers.2.weight"}


def test_a_step_costs_what_the_selection_says():
    model, optimizer, adaptive = make_regression()
    selection = adaptive.reselect(make_batches())
    with FlopCounterMode(display=False) as counter:
        train(model, optimizer, make_batches(1))
    assert counter.get_total_flops() == selection.step_flops


def test_parameters_that_no_selection_could_afford_are_not_measured():
    model, _, adaptive = make_regression(budget_fraction=0.45)
    asked = []
    model.layers.register_forward_pre_hook(
        lambda *_: asked.append({fqn for fqn, p in model.named_parameters() if p.requires_grad})
    )
    batches = make_batches()
    adaptive.reselect(batches)
    asked.clear()
    adaptive.reselect(batches)  # the costs are known by now: only importance runs the model
    assert asked == [set(adaptive.importance)] * 3
    assert "layers.0.weight" not in asked[0]


def test_costs_are_captured_once_per_shape(monkeypatch):
    import gtcompile.training.step_costs as module

    captured = []

    def count(*args, **options):
        captured.append(1)
        return backward_costs(*args, **options)

    monkeypatch.setattr(module, "backward_costs", count)
    _, _, adaptive = make_regression()
    adaptive.reselect(make_batches())
    adaptive.reselect(make_batches(seed=4))
    assert len(captured) == 1
    narrow = adaptive.reselect(make_batches(size=4))
    assert len(captured) == 2
    assert narrow.full_flops * 4 == adaptive.history[0].full_flops


class OnTheHost:
    """A value that only moving turns into the tensor a model needs, as a batch on another device is."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to(self, device):
        return self.tensor.to(device)


def test_batches_are_moved_to_the_models_device_before_costs_are_captured():
    _, _, adaptive = make_regression()
    _, _, expected = make_regression()
    elsewhere = [{name: OnTheHost(tensor) for name, tensor in each.items()} for each in make_batches()]
    assert adaptive.reselect(elsewhere) == expected.reselect(make_batches())


def test_random_numbers_go_on_as_if_nothing_had_been_selected():
    _, _, adaptive = make_regression()
    expected = torch.rand(3, generator=torch.Generator().set_state(torch.get_rng_state()))
    adaptive.reselect({name: value + torch.rand(1) for name, value in b.items()} for b in make_batches())
    assert torch.equal(torch.rand(3), expected)


def test_the_state_goes_through_json_and_training_continues_bit_equal():
    def train_on(model, optimizer, adaptive, epochs):
        for epoch in epochs:
            adaptive.reselect(make_batches(seed=epoch))
            train(model, optimizer, make_batches(seed=9))
        return model, optimizer, adaptive

    options = {"always": ["layers.3.*"], "two_pass": True}
    whole, _, straight = train_on(*make_regression(**options), range(4))
    model, optimizer, adaptive = train_on(*make_regression(**options), range(2))
    saved = json.loads(json.dumps(adaptive.state_dict()))

    resumed = Regression()
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    continued = AdaptiveBackprop(resumed, resumed_optimizer, 0.9, two_pass=True)
    continued.load_state_dict(saved)
    assert trained_parameters(resumed) == trained_parameters(model)
    assert continued.budget_fraction == 0.6
    assert continued.state_dict() == saved
    train_on(resumed, resumed_optimizer, continued, range(2, 4))
    assert continued.history == straight.history
    assert [p.tolist() for p in resumed.parameters()] == [p.tolist() for p in whole.parameters()]


def test_a_state_from_before_the_first_selection_loads():
    model, optimizer, adaptive = make_regression()
    other = AdaptiveBackprop(model, optimizer, 0.9)
    other.load_state_dict(adaptive.state_dict())
    assert other.selection is None
    assert other.budget_fraction == 0.6
    assert len(trained_parameters(model)) == 8


def test_the_state_of_another_model_is_refused_naming_the_differences():
    model, _, adaptive = make_regression()
    adaptive.reselect(make_batches())
    before = adaptive.state_dict()
    state = {**before, "parameters": {**before["parameters"], "layers.0.weight": [8, 9], "head.weight": [1]}}
    with pytest.raises(ValueError, match=r"head\.weight .*\[1\] .*absent.*; layers\.0\.weight .*\[8, 9\]"):
        adaptive.load_state_dict(state)
    del state["parameters"]["head.weight"], state["parameters"]["layers.1.bias"]
    with pytest.raises(ValueError, match=r"; layers\.1\.bias .*absent"):
        adaptive.load_state_dict(state)
    with pytest.raises(ValueError, match="lacks always, budget_fraction, budget_of, ever_trained, history"):
        adaptive.load_state_dict({"trained": []})
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 2"):
        adaptive.load_state_dict({**before, "budget_fraction": 2, "trained": ["layers.0.bias"]})
    assert adaptive.state_dict() == before
    assert trained_parameters(model) == adaptive.selection.trained


def everything(model, optimizer, adaptive):
    return copy.deepcopy(
        (
            [(p.tolist(), p.requires_grad, p.grad is None) for p in model.parameters()],
            str(optimizer.state_dict()),
            adaptive.state_dict(),
            torch.get_rng_state().tolist(),
        )
    )


FAILING_BATCHES = {
    "none": ([], ValueError, "at least two batches"),
    "one": (make_batches(1), ValueError, "at least two batches"),
    "unknown keys": ([{"z": torch.ones(1)}] * 2, ValueError, "takes no 'z'"),
    "not finite": (
        [{"x": torch.full((16, 8), torch.nan), "y": torch.ones(16, 8)}] * 2,
        GTCompileError,
        "nan",
    ),
    "ragged": ([*make_batches(1), *make_batches(1, width=5)], RuntimeError, "shape"),
}


@pytest.mark.parametrize("case", FAILING_BATCHES)
def test_a_reselection_that_fails_changes_nothing(case):
    model, optimizer, adaptive = make_regression()
    adaptive.reselect(make_batches())
    train(model, optimizer, make_batches(2))
    before = everything(model, optimizer, adaptive)
    batches, error, message = FAILING_BATCHES[case]
    with pytest.raises(error, match=message):
        adaptive.reselect(batches)
    assert everything(model, optimizer, adaptive) == before


def test_a_budget_below_the_cheapest_step_fails_before_measuring():
    model, optimizer, adaptive = make_regression(budget_fraction=0.1)
    model.layers[3].bias.register_hook(lambda _: pytest.fail("a backward ran"))
    before = everything(model, optimizer, adaptive)
    with pytest.raises(BudgetError, match=r"budget_fraction 0\.1 is too small") as caught:
        adaptive.reselect(make_batches())
    assert everything(model, optimizer, adaptive) == before
    AdaptiveBackprop(model, optimizer, caught.value.minimum_budget_fraction)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan")])
def test_a_budget_out_of_range_is_refused_by_the_constructor(budget):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        make_regression(budget_fraction=budget)


def test_patterns_are_checked_by_the_constructor():
    with pytest.raises(ValueError, match=r"'layer\.0\.weight' matches no .*layers\.0\.weight"):
        make_regression(always=["layer.0.weight"])
    with pytest.raises(TypeError, match="got the string"):
        make_regression(never="layers.*")


class Signed(nn.Module):
    """A sum whose sign is the batch's: batches of opposite signs contradict each other in every parameter."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))

    def forward(self, x, sign):
        return sign.sum() * self.layers(x).sum()


def make_signed(wrap=lambda model: model, **settings):
    """An AdaptiveBackprop, its model, and two batches that contradict each other."""
    torch.manual_seed(0)
    model = Signed()
    adaptive = AdaptiveBackprop(wrap(model), torch.optim.SGD(model.parameters(), lr=0.1, **settings), 0.7)
    plus, minus = ({"x": torch.ones(2, 3), "sign": torch.tensor([sign])} for sign in (1.0, -1.0))
    return adaptive, model, plus, minus


def test_a_first_selection_of_batches_that_contradict_each_other_measures_within_each(caplog):
    adaptive, model, plus, minus = make_signed()
    with caplog.at_level(logging.WARNING, logger="gtcompile"):
        adaptive.reselect([plus, minus])
    assert "predicted to raise the loss: measured within each batch instead" in caplog.text
    assert trained_parameters(model) == {"layers.1.weight"}
    assert adaptive.importance == measure_importance(
        model, adaptive._optimizer, [plus, minus], only=adaptive.importance, two_pass=True
    )


def test_a_first_selection_where_nothing_would_reduce_any_loss_is_an_error():
    adaptive, model, plus, _ = make_signed(maximize=True)
    with pytest.raises(GTCompileError, match="predicted to raise the loss; measure on more batches"):
        adaptive.reselect([plus, plus])
    assert adaptive.history == ()
    assert trained_parameters(model) == set(dict(model.named_parameters()))


def test_when_nothing_would_reduce_the_loss_the_former_selection_stays(caplog):
    adaptive, model, plus, minus = make_signed()
    first = adaptive.reselect([plus, plus])
    with caplog.at_level(logging.WARNING, logger="gtcompile"):
        assert adaptive.reselect([plus, minus]) is first
    assert "the former selection stays" in caplog.text
    assert trained_parameters(model) == first.trained == {"layers.1.weight"}
    assert adaptive.history == (first, first)


def test_full_budget_trains_everything():
    model, _, adaptive = make_regression(budget_fraction=1.0)
    train_only(model, ["layers.0.*"])
    selection = adaptive.reselect(make_batches())
    assert selection.step_flops == selection.full_flops
    assert trained_parameters(model) == {fqn for fqn, _ in model.named_parameters()}


def test_a_model_without_a_loss_is_refused():
    class NoLoss(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = NoLoss(2, 2)
    adaptive = AdaptiveBackprop(model, torch.optim.SGD(model.parameters()), 0.5)
    with pytest.raises(CaptureError, match="return its loss"):
        adaptive.reselect([{"x": torch.ones(1, 2)}] * 2)


def test_a_whole_loader_is_cut_short_with_a_message(caplog):
    _, _, adaptive = make_regression()
    taken = []

    def loader():
        for number in range(1000):
            taken.append(number)
            yield make_batches()[0]

    adaptive.reselect(loader())
    assert len(taken) == 17
    assert "selecting on the first 16 batches; max_batches=None takes all" in caplog.text
    caplog.clear()
    adaptive.reselect(make_batches(), max_batches=None)
    assert not caplog.text
    with pytest.raises(ValueError, match="expected max_batches of at least 1"):
        adaptive.reselect(make_batches(), max_batches=0)


def test_representations_are_short():
    _, _, adaptive = make_regression()
    assert "budget 0.6 of a full step's FLOPs, policy Best(), nothing selected yet" in repr(adaptive)
    selection = adaptive.reselect(make_batches())
    assert str(selection) in repr(adaptive)
    assert repr(selection) == f"<Selection: {selection}>"


def test_a_selection_says_what_it_does(caplog):
    _, _, adaptive = make_regression()
    with caplog.at_level("INFO", logger="gtcompile"):
        adaptive.reselect(make_batches())
    assert "capturing one training step" in caplog.text
    assert re.search(r"measuring the importance of \d+ parameters on 3 batches", caplog.text)
