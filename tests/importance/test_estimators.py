"""Importance against really stepping a copy, and the promise that measuring changes nothing."""

import copy
import itertools
import logging
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gtcompile import CaptureError, GTCompileError, measure_importance, train_only, trained_parameters

OPTIMIZERS = {
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "AdamW, tensor lr": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-2)),
    "Adam, decay, amsgrad": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "Adam, foreach": lambda ps: torch.optim.Adam(ps, lr=1e-2, foreach=True),
    "Adam, maximize": lambda ps: torch.optim.Adam(ps, lr=1e-2, maximize=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD, momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.1),
    "SGD, nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.5, centered=True),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "NAdam": lambda ps: torch.optim.NAdam(ps, lr=1e-2),
}


class Model(nn.Module):
    """A tied, normalised, dropped-out regression that keeps statistics and replaces a buffer."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(dropout)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(6, 1)
        self.unused = nn.Parameter(torch.ones(3))
        self.given = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x, y):
        self.calls = self.calls + 1
        noise = random.random() + np.random.rand()
        hidden = self.drop(self.norm(torch.tanh(self.first(x))))
        return ((self.last(torch.tanh(self.tied(hidden))) - y) ** 2).mean() + noise * self.given.sum()


MEASURED = ["first.weight", "first.bias", "norm.weight", "norm.bias", "tied.bias", "last.weight", "last.bias"]


def make_batches(count, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(size, 6, generator=generator) for _ in range(count)]
    return [{"x": x, "y": x[:, :1] - 2 * x[:, 1:2]} for x in xs]


def make_trained(make_optimizer, *, steps=2, dropout=0.0):
    """A model and its optimizer after a few real steps."""
    torch.manual_seed(1)
    model = Model(dropout)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for batch in make_batches(steps, seed=9):
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def gradients(model, batch):
    model.zero_grad()
    model(**batch).backward()
    return {fqn: p.grad.clone() for fqn, p in model.named_parameters() if p.grad is not None}


def really_step(model, optimizer, batch):
    """What the optimizer did to each parameter of these copies."""
    before = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    model.zero_grad()
    model(**batch).backward()
    optimizer.step()
    return {fqn: p.detach() - before[fqn] for fqn, p in model.named_parameters()}


def reference(model, optimizer, batches, *, two_pass=False):
    """The definition, by stepping copies."""
    pairs = zip(batches, batches, strict=True) if two_pass else list(itertools.pairwise(batches))
    total = dict.fromkeys(MEASURED, 0.0)
    for stepped_with, judged_by in pairs:
        stepped, stepping = copy.deepcopy((model, optimizer))
        updates = really_step(stepped, stepping, stepped_with)
        judge = stepped if two_pass else copy.deepcopy(model)
        for fqn, gradient in gradients(judge, judged_by).items():
            total[fqn] -= (updates[fqn].double() * gradient.double()).sum().item()
    count = len(batches) - (not two_pass)
    return {fqn: value / count for fqn, value in total.items()}


def assert_close(measured, expected):
    assert list(measured) == list(expected)
    for fqn, value in expected.items():
        assert measured[fqn] == pytest.approx(value, rel=1e-4, abs=1e-7), fqn


@pytest.mark.parametrize("two_pass", [False, True], ids=["across batches", "two-pass"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_importance_is_what_stepping_a_copy_of_the_optimizer_predicts(name, two_pass):
    model, optimizer = make_trained(OPTIMIZERS[name])
    batches = make_batches(3)
    expected = reference(model, optimizer, batches, two_pass=two_pass)
    assert_close(measure_importance(model, optimizer, batches, two_pass=two_pass), expected)
    assert any(expected.values())


def test_an_optimizer_that_never_stepped_needs_no_state():
    model, optimizer = make_trained(OPTIMIZERS["AdamW"], steps=0)
    batches = make_batches(2)
    expected = reference(model, optimizer, batches)
    assert_close(measure_importance(model, optimizer, batches), expected)
    assert not optimizer.state


def test_each_parameter_group_steps_with_its_own_hyperparameters():
    model, _ = make_trained(OPTIMIZERS["SGD"])
    groups = [
        {"params": model.first.parameters(), "lr": 0.5},
        {"params": [*model.norm.parameters(), model.tied.bias, model.unused], "weight_decay": 0.3},
        {"params": model.last.parameters(), "lr": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    batches = make_batches(2)
    measured = measure_importance(model, optimizer, batches)
    assert_close(measured, reference(model, optimizer, batches))
    assert measured["last.weight"] == 0.0


def snapshot(model, optimizer):
    """Everything that measuring must leave alone, compared by bytes and identity."""

    def bits(value):
        if isinstance(value, torch.Tensor):
            return id(value), value.dtype, value.detach().clone().flatten().view(torch.uint8).tolist()
        if isinstance(value, dict):
            return [(key if isinstance(key, str) else id(key), bits(item)) for key, item in value.items()]
        return [bits(item) for item in value] if isinstance(value, list | tuple) else value

    return {
        "parameters": bits(dict(model.named_parameters())),
        "gradients": bits([p.grad for p in model.parameters()]),
        "asked": [p.requires_grad for p in model.parameters()],
        "trained": trained_parameters(model),
        "buffers": bits([dict(part._buffers) for part in model.modules()]),
        "training": [part.training for part in model.modules()],
        "hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "state": bits(dict(optimizer.state)),
        "groups": bits(optimizer.param_groups),
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


class Interrupted(nn.Identity):
    """Raises when it has been run so often, forward and backward counted together."""

    def __init__(self, after, error):
        super().__init__()
        self.left, self.error = after, error

    def count(self, *_):
        self.left -= 1
        if self.left < 0:
            raise self.error("now")

    def forward(self, x):
        self.count()
        if x.requires_grad:
            x.register_hook(self.count)
        return x


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    two_pass=st.booleans(),
    training=st.booleans(),
    accumulated=st.booleans(),
    trained=st.none() | st.sets(st.sampled_from(MEASURED), min_size=1),
    only=st.none() | st.sets(st.sampled_from(MEASURED), min_size=1),
    fails_after=st.none() | st.integers(0, 7),
    error=st.sampled_from([RuntimeError, KeyboardInterrupt]),
)
def test_nothing_changes_whether_it_succeeds_fails_or_is_interrupted(
    name, two_pass, training, accumulated, trained, only, fails_after, error
):
    model, optimizer = make_trained(OPTIMIZERS[name], dropout=0.3)
    model.train(training)
    if trained is not None:
        train_only(model, trained)
    if accumulated:
        model(**make_batches(1, seed=3)[0]).backward()
    model.drop = Interrupted(100 if fails_after is None else fails_after, error).train(training)
    before = snapshot(model, optimizer)
    try:
        measured = measure_importance(model, optimizer, make_batches(3), only=only, two_pass=two_pass)
    except (RuntimeError, KeyboardInterrupt):
        assert model.drop.left < 0
    else:
        assert model.drop.left >= 0
        assert list(measured) == [fqn for fqn in MEASURED if only is None or fqn in only]
    assert snapshot(model, optimizer) == before


def test_training_goes_on_bit_equal_after_a_measurement():
    def train(measuring):
        model, optimizer = make_trained(OPTIMIZERS["AdamW"], dropout=0.3)
        for batch in make_batches(3):
            if measuring:
                measure_importance(model, optimizer, make_batches(2, seed=5))
            optimizer.zero_grad()
            model(**batch).backward()
            optimizer.step()
        return [p.tolist() for p in model.parameters()]

    assert train(measuring=True) == train(measuring=False)


def test_hooks_on_the_real_optimizers_step_do_not_run():
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("the real optimizer's hook ran"))
    torch.optim.lr_scheduler.LinearLR(optimizer)  # wraps optimizer.step
    optimizer.step = lambda: pytest.fail("the real optimizer stepped")
    assert measure_importance(model, optimizer, make_batches(2))


class SignalAndNoise(nn.Module):
    """The loss depends on one parameter as the data says, on the other through noise of mean zero."""

    def __init__(self):
        super().__init__()
        self.signal = nn.Parameter(torch.zeros(2000))
        self.noise = nn.Parameter(torch.zeros(2000))

    def forward(self, noise):
        return ((self.signal - 1) ** 2).mean() + (self.noise * noise).mean()


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_noise_is_not_important_across_batches_but_is_within_one(name):
    model = SignalAndNoise()
    optimizer = OPTIMIZERS[name](model.parameters())
    generator = torch.Generator().manual_seed(0)
    batches = [{"noise": torch.randn(2000, generator=generator)} for _ in range(6)]
    across = measure_importance(model, optimizer, batches)
    within = measure_importance(model, optimizer, batches, two_pass=True)
    repeated = measure_importance(model, optimizer, [batches[0]] * 2)
    assert within["noise"] > 0
    assert repeated["noise"] > 0
    assert abs(across["noise"]) < 0.1 * within["noise"]
    assert across["signal"] == pytest.approx(within["signal"], rel=0.2)


def test_a_warm_up_that_starts_at_zero_measures_with_the_rate_it_warms_up_to():
    model, optimizer = make_trained(OPTIMIZERS["SGD"], steps=0)
    batches = make_batches(2)
    expected = reference(model, optimizer, batches)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert_close(measure_importance(model, optimizer, batches), expected)
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_learning_rates_that_are_all_zero_are_an_error():
    model, optimizer = make_trained(lambda ps: torch.optim.SGD(ps, lr=0.0), steps=0)
    with pytest.raises(ValueError, match="every learning rate of this SGD is 0"):
        measure_importance(model, optimizer, make_batches(2))


def test_gradients_that_are_zero_give_importance_zero():
    model = SignalAndNoise()
    nn.init.ones_(model.signal)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [{"noise": torch.zeros(2000)}] * 2
    assert measure_importance(model, optimizer, batches) == {"signal": 0.0, "noise": 0.0}


def test_an_update_against_the_gradient_of_the_next_batch_is_negative():
    model = SignalAndNoise()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [{"noise": torch.ones(2000)}, {"noise": -torch.ones(2000)}]
    assert measure_importance(model, optimizer, batches)["noise"] < 0


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_batch_with_a_loss_that_is_not_finite_is_left_out_and_logged(bad, caplog):
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    good = make_batches(3)
    batches = [*good[:bad], {"x": good[0]["x"], "y": good[0]["y"] * torch.nan}, *good[bad:]]
    expected = reference(model, optimizer, good)
    with caplog.at_level(logging.WARNING, logger="gtcompile"):
        assert_close(measure_importance(model, optimizer, batches), expected)
    assert f"batch {bad} is left out: the loss is nan" in caplog.text


def test_batches_that_are_left_out_are_told_once(caplog):
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    good = make_batches(3)
    bad = {"x": good[0]["x"], "y": good[0]["y"] * torch.nan}
    with caplog.at_level(logging.WARNING, logger="gtcompile"):
        measure_importance(model, optimizer, [bad, *good, bad, bad, bad])
    told = ["importance: batches 0, 4, 5 and 1 more are left out; the first because the loss is nan"]
    assert [record.getMessage() for record in caplog.records] == told
    caplog.clear()
    with pytest.raises(GTCompileError, match="in batch 2 the loss is nan and 3 more"):
        measure_importance(model, optimizer, [bad] * 6)
    assert not caplog.records


class RootModel(nn.Module):
    """The gradient of `deep` is infinite where x is 0, though the loss is finite; that of `late` is not."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Parameter(torch.zeros(3))
        self.late = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return ((self.deep + x).sqrt() * self.late).sum()


def test_a_batch_with_a_gradient_that_is_not_finite_adds_nothing():
    model = RootModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    good = [{"x": torch.full((3,), float(value))} for value in (1, 4, 9)]
    bad = {"x": torch.zeros(3)}
    measured = measure_importance(model, optimizer, [good[0], bad, good[1]])
    # deep: 1/(2*sqrt(x)) from 1 and 4; late: sqrt(x), from the bad batch's finite 0 and from 4
    assert measured == pytest.approx({"deep": 0.1 * 3 * 0.5 * 0.25, "late": 0.0})


@pytest.mark.parametrize(("two_pass", "count"), [(False, 2), (True, 1)])
def test_too_few_finite_batches_are_an_error_that_names_batch_and_parameter(two_pass, count):
    model = RootModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [{"x": torch.zeros(3)}] * count
    with pytest.raises(GTCompileError, match="in batch 0 the gradient of deep is not finite"):
        measure_importance(model, optimizer, batches, two_pass=two_pass)


@pytest.mark.parametrize("two_pass", [False, True])
def test_moments_that_are_not_finite_are_named(two_pass):
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    optimizer.state[model.last.bias]["exp_avg"].fill_(torch.nan)
    with pytest.raises(GTCompileError, match=r"the optimizer's update of last\.bias is not finite"):
        measure_importance(model, optimizer, make_batches(2), two_pass=two_pass)


class Routed(nn.Module):
    """Uses one of two experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ParameterList([torch.ones(2), torch.ones(2)])

    def forward(self, x, expert):
        return (self.experts[expert] * x).sum()


def test_a_parameter_that_some_batches_do_not_use_counts_as_zero_there():
    model = Routed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [{"x": torch.ones(2), "expert": expert} for expert in (0, 0, 1)]
    measured = measure_importance(model, optimizer, batches)
    assert measured == pytest.approx({"experts.0": 0.1, "experts.1": 0.0})


def test_only_selects_by_name_alias_or_pattern_and_computes_no_other_gradient():
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    batches, asked = make_batches(2), []
    everything = measure_importance(model, optimizer, batches)
    model.norm.register_forward_pre_hook(
        lambda *_: asked.append({fqn for fqn, p in model.named_parameters() if p.requires_grad})
    )
    some = measure_importance(model, optimizer, batches, only=["tied.weight", "last.*"])
    assert some == {fqn: everything[fqn] for fqn in ("first.weight", "last.weight", "last.bias")}
    assert asked == [set(some)] * 2


def test_parameters_frozen_by_train_only_are_measured_and_those_frozen_by_the_user_are_not():
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    batches = make_batches(2)
    everything = measure_importance(model, optimizer, batches)
    train_only(model, ["last.*"])
    model.last.bias.requires_grad_(False)
    measured = measure_importance(model, optimizer, batches)
    assert measured == {fqn: value for fqn, value in everything.items() if fqn != "last.bias"}
    assert trained_parameters(model) == {"last.weight"}


def test_a_compiled_models_parameters_go_by_their_own_names():
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    batches = make_batches(2)
    compiled = torch.compile(model, backend="eager")
    assert measure_importance(compiled, optimizer, batches) == measure_importance(model, optimizer, batches)


def test_outputs_with_a_loss_and_autocast_work():
    class WithOutput(Model):
        def forward(self, x, y):
            return {"loss": super().forward(x, y)}

    model = WithOutput(dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batches = make_batches(2)
    plain = measure_importance(model, optimizer, batches)
    with torch.autocast("cpu", torch.bfloat16):
        cast = measure_importance(model, optimizer, batches)
    assert plain != cast
    assert cast == pytest.approx(plain, rel=0.2, abs=1e-4)


BAD_ARGUMENTS = {
    "no batch": (lambda model, optimizer: (model, optimizer, []), ValueError, "at least two batches"),
    "one batch": (lambda m, o: (m, o, make_batches(1)), ValueError, r"\(two_pass=True takes one\), got 1"),
    "a bare batch": (lambda m, o: (m, o, make_batches(1)[0]), TypeError, "got one batch"),
    "unknown keys": (lambda m, o: (m, o, [{"z": torch.ones(1)}] * 2), ValueError, "takes no 'z'"),
    "no optimizer": (lambda m, o: (m, "AdamW", make_batches(2)), TypeError, r"expected a torch\.optim"),
    "another model's optimizer": (
        lambda m, o: (m, torch.optim.SGD(Model().parameters()), make_batches(2)),
        ValueError,
        r"does not own unused, first\.weight, first\.bias and 5 more",
    ),
    "LBFGS": (
        lambda m, o: (m, torch.optim.LBFGS(m.parameters()), make_batches(2)),
        ValueError,
        "no parameter has an update of its own",
    ),
    "nothing trainable": (
        lambda m, o: (m.requires_grad_(False), o, make_batches(2)),
        ValueError,
        "has no parameter with requires_grad=True",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_before_the_model_runs(case):
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    arguments, error, message = BAD_ARGUMENTS[case]
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        measure_importance(*arguments(model, optimizer))


def test_only_without_a_match_or_empty_is_refused():
    model, optimizer = make_trained(OPTIMIZERS["AdamW"])
    with pytest.raises(ValueError, match=r"'fist\.weight' matches no .* near names: first\.weight"):
        measure_importance(model, optimizer, make_batches(2), only=["fist.weight"])
    with pytest.raises(ValueError, match="got none in `only`"):
        measure_importance(model, optimizer, make_batches(2), only=[])


def test_a_model_without_a_loss_is_refused():
    class NoLoss(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    model = NoLoss(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(CaptureError, match="Does the batch contain labels"):
        measure_importance(model, optimizer, [{"x": torch.ones(1, 2)}] * 2)


class Phase(nn.Module):
    """A regression on an imaginary part, which only the imaginary part of the complex weight changes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.cfloat))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x, y):
        return ((x * self.weight).imag + self.bias - y).square().mean()


@pytest.mark.parametrize("two_pass", [False, True])
def test_both_parts_of_a_complex_parameter_count(two_pass):
    torch.manual_seed(0)
    model, batch = Phase(), {"x": torch.rand(64, 4), "y": torch.randn(64, 4) + 3}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # two_pass measures at the updated weights
    measured = measure_importance(model, optimizer, [batch, batch], two_pass=two_pass)
    model(**batch).backward()
    expected = {fqn: 1e-4 * p.grad.abs().square().sum().item() for fqn, p in model.named_parameters()}
    assert measured == pytest.approx(expected, rel=1e-3)
    assert measured["weight"] > 0


class Bag(nn.Module):
    """Classifies the mean of embeddings, whose gradient may be sparse."""

    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8, sparse=sparse)
        self.head = nn.Linear(8, 2)

    def forward(self, ids, labels):
        return nn.functional.cross_entropy(self.head(self.embed(ids).mean(1)), labels)


@pytest.mark.parametrize("two_pass", [False, True])
def test_a_sparse_gradient_has_the_importance_of_the_dense_one(two_pass):
    torch.manual_seed(1)
    ids = torch.randint(0, 5, (6, 4))  # rows of the table occur several times
    batches = [{"ids": ids, "labels": torch.randint(0, 2, (6,))} for _ in range(2)]

    def measured(sparse):
        model = Bag(sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return measure_importance(model, optimizer, batches, two_pass=two_pass)

    assert measured(sparse=True) == pytest.approx(measured(sparse=False), rel=1e-4)


def test_an_optimizer_for_sparse_gradients_alone_is_measured():
    torch.manual_seed(1)
    model = Bag(sparse=True)
    optimizer = torch.optim.SparseAdam([model.embed.weight], lr=0.1)
    batch = {"ids": torch.randint(0, 5, (6, 4)), "labels": torch.randint(0, 2, (6,))}
    assert measure_importance(model, optimizer, [batch, batch], only=["embed.weight"])["embed.weight"] > 0


def test_a_sparse_gradient_that_is_not_finite_is_noticed():
    model = Bag(sparse=True)
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    batch = {"ids": torch.zeros(2, 2, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(GTCompileError, match="too few of 2 batches"):
        measure_importance(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch, batch])
