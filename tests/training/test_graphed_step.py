"""Recorded training steps: when one is recorded, what it is fed, when it is forgotten, what is refused.

No test runs a CUDA graph: `Recorded` stands for one, and runs the step itself at every replay.
"""

import contextlib
import copy
import logging
import re

import pytest
import torch
from torch import nn

from gtcompile import AdaptiveBackprop, GTCompileError, compile_blocks, train_only
from gtcompile.training.cuda_graphs import check_optimizer, check_recordable
from gtcompile.training.graphed_step import WARM_UP, GraphedStep
from tests.support.models import Regression, make_batch

SETS = (["layers.0.weight", "layers.1.bias"], ["layers.1.*"])


class Recorded:
    """A recorder whose replays run the recorded step, and which notes the order of calls."""

    def __init__(self):
        self.calls = []

    @contextlib.contextmanager
    def aside(self):
        self.calls.append("ordinary")
        yield

    def record(self, step):
        self.calls.append("record")

        def replay():
            self.calls.append("replay")
            return step()

        return replay


def make(**settings):
    torch.manual_seed(0)
    model = Regression(2)
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})
    recorder = Recorded()
    return model, optimizer, recorder, GraphedStep(model, optimizer, None, recorder)


def ordinary(count):
    return ["ordinary"] * count


def first_calls():
    """The calls until the first replay: the optimizer's first step makes its state, so it is not counted."""
    return [*ordinary(1 + WARM_UP), "record", "replay"]


def test_a_step_is_recorded_after_the_warm_up_and_then_replayed():
    _, _, recorder, step = make()
    for seed in range(WARM_UP + 4):
        step(make_batch(seed))
    assert recorder.calls == [*first_calls(), "replay", "replay"]


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_and_losses_are_those_of_an_ordinary_loop_over_several_sets(compiled):
    model, _, recorder, step = make()
    if compiled:
        compile_blocks(model, blocks=["layers.0", "layers.1"], compiler="eager")
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for trained in SETS:
        train_only(model, trained)
        train_only(twin, trained)
        for seed in range(WARM_UP + 4):
            batch = make_batch(seed)
            expected = twin(**batch)
            expected.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = step(batch)
            assert torch.equal(loss, expected.detach())
            assert not loss.requires_grad
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert recorder.calls.count("record") == len(SETS)


def test_the_loss_of_a_step_survives_the_next_replay():
    _, _, _, step = make()
    losses = [step(make_batch()) for _ in range(WARM_UP + 4)]
    assert len({float(loss) for loss in losses}) == len(losses)


def test_another_shape_runs_as_an_ordinary_step_and_the_recording_stays():
    _, _, recorder, step = make()
    small = {name: value[:1] for name, value in make_batch().items()}
    for _ in range(WARM_UP + 2):
        step(make_batch())
    step(small)
    step(make_batch())
    assert recorder.calls == [*first_calls(), "ordinary", "replay"]


def test_shapes_that_take_turns_do_not_drop_the_recording():
    _, _, recorder, step = make()
    small = {name: value[:1] for name, value in make_batch().items()}
    for _ in range(WARM_UP + 2):
        step(make_batch())
    for _ in range(2 * WARM_UP):
        step(small)
        step(make_batch())
    assert recorder.calls == [*first_calls(), *["ordinary", "replay"] * (2 * WARM_UP)]


def test_a_shape_that_stays_is_recorded_in_place_of_the_former_one():
    _, _, recorder, step = make()
    small = {name: value[:1] for name, value in make_batch().items()}
    for _ in range(WARM_UP + 2):
        step(make_batch())
    for _ in range(WARM_UP + 1):
        step(small)
    assert recorder.calls == [*first_calls(), *ordinary(WARM_UP), "record", "replay"]


def replace_weight(model, _):
    model.layers[0].weight.data = model.layers[0].weight.data.clone()


def change_rate(_, optimizer):
    optimizer.param_groups[0]["lr"] = 0.2


def load_state(_, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda model, _: train_only(model, ["layers.0.weight"]),
        lambda model, _: model.eval(),
        lambda _, optimizer: optimizer.state.clear(),
        load_state,
        replace_weight,
        change_rate,
    ],
    ids=["another set", "eval", "dropped state", "loaded state", "replaced weight", "another rate"],
)
def test_whatever_a_recording_relies_on_may_change(change):
    model, optimizer, recorder, step = make()
    for _ in range(WARM_UP + 2):
        step(make_batch())
    assert step.recorded
    change(model, optimizer)
    step(make_batch())
    assert recorder.calls[len(first_calls()) :] == ["ordinary"]
    assert not step.recorded


def test_a_rate_that_is_a_tensor_may_change():
    _, optimizer, recorder, step = make(lr=torch.tensor(0.1))
    for _ in range(WARM_UP + 4):
        step(make_batch())
        optimizer.param_groups[0]["lr"].mul_(0.9)
    assert recorder.calls == [*first_calls(), "replay", "replay"]


def test_a_rate_that_changes_at_every_step_is_followed_and_warned_about_once(caplog):
    _, optimizer, recorder, step = make()
    with caplog.at_level(logging.WARNING):
        for _ in range(3 * WARM_UP):
            step(make_batch())
            optimizer.param_groups[0]["lr"] *= 0.9
    assert recorder.calls == ordinary(3 * WARM_UP)
    assert [record.message for record in caplog.records if "lr=torch.tensor(" in record.message] != []
    assert len(caplog.records) == 1


def test_batches_that_differ_in_more_than_tensors_are_not_served_the_same_recording():
    model = nn.Linear(8, 1)
    optimizer, recorder = torch.optim.SGD(model.parameters(), lr=0.1), Recorded()
    step = GraphedStep(model, optimizer, lambda m, batch: m(batch["x"]).mean() * batch["factor"], recorder)
    for factor in (1.0, 1.0, 1.0, 1.0, 2.0, 1.0):
        step({"x": torch.ones(2, 8), "factor": factor})
    assert recorder.calls == [*ordinary(WARM_UP), "record", "replay", "ordinary", "replay"]


def test_a_step_that_cannot_be_recorded_is_an_error_that_leaves_no_gradients(monkeypatch):
    model, _, recorder, step = make()

    def fail(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", fail)
    for _ in range(WARM_UP + 1):
        step(make_batch())
    with pytest.raises(GTCompileError, match=r"Regression cannot be recorded: operation not permitted"):
        step(make_batch())
    assert all(parameter.grad is None for parameter in model.parameters())
    step(make_batch())


def test_gradients_from_before_are_refused():
    model, _, recorder, step = make()
    model(**make_batch()).backward()
    with pytest.raises(GTCompileError, match=r"no gradients before train_step.*zero_grad"):
        step(make_batch())
    assert recorder.calls == []


def test_autocast_around_a_step_is_refused_and_inside_of_it_is_not():
    _, _, recorder, step = make()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(GTCompileError, match="inside of loss_fn"):
        step(make_batch())
    assert recorder.calls == []


def test_without_a_cuda_device_nothing_is_recorded():
    model = Regression(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"CUDA graphs need a CUDA device, and the model is on cpu"):
        AdaptiveBackprop(model, optimizer, cuda_graphs=True)


def test_several_processes_are_refused():
    model = Regression(2)
    with pytest.raises(ValueError, match=r"in one process, and 2 train"):
        check_recordable(model, torch.optim.SGD(model.parameters(), lr=0.1), processes=2)


def test_a_prefix_cache_is_refused():
    model = Regression(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="prefix_cache looks every batch up on the host"):
        AdaptiveBackprop(model, optimizer, cuda_graphs=True, prefix_cache=True)


CPU = torch.device("cpu")
PARAMETERS = [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("make_optimizer", "advice"),
    [
        (lambda: torch.optim.AdamW(PARAMETERS), "pass capturable=True to it"),
        (lambda: torch.optim.Adam(PARAMETERS), "pass capturable=True to it"),
        (lambda: torch.optim.Adagrad(PARAMETERS), "use AdamW(..., capturable=True)"),
        (lambda: torch.optim.LBFGS(PARAMETERS), "use AdamW(..., capturable=True)"),
    ],
)
def test_an_optimizer_that_counts_on_the_host_is_refused_with_what_to_do(make_optimizer, advice):
    with pytest.raises(ValueError, match=re.escape(advice)):
        check_optimizer(make_optimizer(), CPU)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: torch.optim.AdamW(PARAMETERS, capturable=True),
        lambda: torch.optim.AdamW(PARAMETERS, lr=torch.tensor(1e-4), capturable=True),
        lambda: torch.optim.SGD(PARAMETERS, lr=0.1),
    ],
)
def test_an_optimizer_that_counts_on_the_device_is_taken(make_optimizer):
    check_optimizer(make_optimizer(), CPU)


def test_a_learning_rate_on_the_host_is_refused_with_what_to_write():
    optimizer = torch.optim.AdamW(PARAMETERS, lr=torch.tensor(1e-4), capturable=True)
    with pytest.raises(ValueError, match=re.escape("lr=torch.tensor(0.0001, device='cuda:0')")):
        check_optimizer(optimizer, torch.device("cuda:0"))


def test_train_step_without_the_option_says_what_to_do():
    model = Regression(2)
    adaptive = AdaptiveBackprop(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(GTCompileError, match="cuda_graphs=True"):
        adaptive.train_step(make_batch())


def test_a_selection_forgets_the_recording(monkeypatch):
    recorder = Recorded()
    monkeypatch.setattr("gtcompile.training.adaptive.check_recordable", lambda *_: None)
    monkeypatch.setattr("gtcompile.training.adaptive.CudaGraphs", lambda _: recorder)
    model = Regression(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    adaptive = AdaptiveBackprop(model, optimizer, 0.7, cuda_graphs=True)
    for seed in range(2):
        adaptive.reselect([make_batch(seed), make_batch(seed + 1)])
        for _ in range(WARM_UP + 3):
            adaptive.train_step(make_batch())
        adaptive.step()
        assert recorder.calls.count("record") == seed + 1
