"""Trainings saved and continued: alone, on two ranks, on another number; killed, and out of room."""

import os
import random
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gtcompile import AdaptiveBackprop, load_training, save_training
from gtcompile.capture import rng
from tests.ranks.training_state_run import POINTS, Training, assert_equal
from tests.support.launching import run_on_ranks, torchrun
from tests.support.models import Regression, make_batch

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


run = partial(run_on_ranks, "training_state_run")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("wrapper", ["replicated", "sharded"])
def test_a_continued_training_equals_one_that_never_stopped(wrapper, point, tmp_path):
    uninterrupted, first, again = Training(wrapper), Training(wrapper), Training(wrapper, seed=1)
    uninterrupted.go_on()
    step, selected = POINTS[point]
    first.go_on(step, select=selected)
    first.save(tmp_path / "saved")
    again.load(tmp_path / "saved")
    again.go_on()
    assert_equal(again.outcome(), uninterrupted.outcome(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [pytest.param("replicated", marks=pytest.mark.long), "sharded"])
def test_two_ranks_go_on_bit_for_bit(wrapper, tmp_path):
    run(wrapper, "resume", tmp_path)


@pytest.mark.long
def test_sharded_training_goes_on_with_another_number_of_ranks_and_unsharded(tmp_path):
    run("sharded", "resume", tmp_path)
    run("sharded", "continue", tmp_path, ranks=1)
    run("replicated", "continue", tmp_path, ranks=1)


@pytest.mark.long
def test_where_there_is_no_room_the_former_state_stays(tmp_path):
    said = run("sharded", "full", tmp_path)
    for rank in range(2):
        assert re.search(rf"rank {rank}: the training could not be saved.*rank 1: .*too large", said)


@pytest.mark.long
@pytest.mark.usefixtures("one_rank")
def test_a_kill_at_any_moment_leaves_a_state_that_can_be_continued(tmp_path):
    folder, delays = tmp_path / "saved", random.Random(0)
    for _ in range(20):
        kill_while_saving(folder, delays.random())
        training = Training("replicated")
        training.load(folder)
        training.go_on(training.step + 2)


def kill_while_saving(folder: Path, delay: float) -> None:
    """Start two ranks, kill both at once so many seconds after the first save."""
    launched = subprocess.Popen(
        torchrun("-m", "tests.ranks.training_state_run", "sharded", "save", folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert launched.stdout is not None
    said = ""
    while "saved" not in said:
        line = launched.stdout.readline()
        assert line, "ended before anything was saved"
        said += line
    time.sleep(delay)
    for pid in re.findall(r"pid (\d+)", said):
        os.kill(int(pid), signal.SIGKILL)
    launched.communicate(timeout=60)


def alone(depth: int = 4) -> tuple[nn.Module, torch.optim.Optimizer, AdaptiveBackprop]:
    model = Regression(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, AdaptiveBackprop(model, optimizer, 0.7)


def test_one_process_without_any_group_saves_and_continues(tmp_path):
    training, again = alone(), alone()
    training[2].reselect([make_batch(0), make_batch(1)])
    training[0](**make_batch()).backward()
    training[1].step()
    save_training(tmp_path, *training, {"epoch": 3})
    assert load_training(tmp_path, *again) == {"epoch": 3}
    assert again[2].selection == training[2].selection
    torch.testing.assert_close(again[0].state_dict(), training[0].state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again[1].state_dict(), training[1].state_dict(), rtol=0, atol=0)


def test_what_is_of_another_training_is_refused_and_changes_nothing(tmp_path):
    save_training(tmp_path, *alone(), {})
    other = alone(depth=3)
    before = {name: tensor.clone() for name, tensor in other[0].state_dict().items()}
    with pytest.raises(
        ValueError, match=r"another model: layers\.3\.bias was \[8\] when saved and is absent now"
    ):
        load_training(tmp_path, *other)
    torch.testing.assert_close(dict(other[0].state_dict()), before, rtol=0, atol=0)
    model, optimizer, _ = alone()
    with torch.no_grad():
        model.layers[0].bias.add_(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotating = AdaptiveBackprop(model, optimizer, 0.7, policy="rotating")
    with pytest.raises(ValueError, match="the state of the policy"):
        load_training(tmp_path, model, optimizer, rotating)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    model, _, adaptive = alone()
    half = torch.optim.SGD(list(model.parameters())[:4], lr=0.1)
    with pytest.raises(ValueError, match="other parameters in its groups"):
        load_training(tmp_path, model, half, adaptive)


def test_a_random_state_that_a_device_here_does_not_take_is_refused_and_changes_nothing(
    tmp_path, monkeypatch
):
    state = torch.zeros(16, dtype=torch.uint8)
    visible = {"_accelerator": "cuda", "_device_count": 2, "_current_device": 0}
    for name, value in visible.items():
        monkeypatch.setattr(rng, name, lambda value=value: value)
    monkeypatch.setattr(rng, "_get_device_state", lambda *_: state)
    monkeypatch.setattr(rng, "_set_device_state", lambda *_: None)
    save_training(tmp_path, *alone(), {})
    model, optimizer, adaptive = alone()
    with torch.no_grad():
        model.layers[0].bias.add_(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(rng, "_get_device_state", lambda *_: state[:8])
    with pytest.raises(ValueError, match=r"unusable entry for cuda:0: expected .* \(8,\), got .* \(16,\)"):
        load_training(tmp_path, model, optimizer, adaptive)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not optimizer.state
    monkeypatch.setattr(rng, "_get_device_state", lambda *_: state)
    monkeypatch.setattr(rng, "_device_count", lambda: 1)
    load_training(tmp_path, model, optimizer, adaptive)


def test_an_empty_folder_is_nothing_to_continue(tmp_path):
    with pytest.raises(ValueError, match="nothing to continue"):
        load_training(tmp_path, *alone())


def test_a_new_state_takes_the_place_of_the_former_and_of_what_a_killed_save_left(tmp_path):
    training = alone()
    save_training(tmp_path, *training, {"step": 1})
    (tmp_path / "state-7").mkdir()
    (tmp_path / ".latest.k1ll3d").touch()
    save_training(tmp_path, *training, {"step": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "state-1"]
    assert load_training(tmp_path, *alone()) == {"step": 2}
