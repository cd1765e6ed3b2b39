"""Random states are restored, also on fewer devices than they were saved on; wrong ones are refused."""

import random

import numpy as np
import pytest
import torch

from gtcompile.capture import rng
from gtcompile.capture.rng import check_random_state, random_state, random_state_kept, restore_random_state


class Devices:
    """Stands in for `torch.cuda`: a generator for each of some devices."""

    def __init__(self, count):
        self.states = [torch.tensor([i], dtype=torch.uint8) for i in range(count)]

    def get_rng_state(self, index):
        return self.states[index].clone()

    def set_rng_state(self, state, index):
        self.states[index] = state


@pytest.fixture
def plug(monkeypatch):
    """Has this many devices be visible, one of them the current one."""

    def visible(count, kind="cuda", current=0):
        monkeypatch.setattr(rng, "_current_device", lambda: current if count else None)
        devices = Devices(count)
        monkeypatch.setattr(rng, "_accelerator", lambda: kind if count else None)
        monkeypatch.setattr(rng, "_device_count", lambda: count)
        monkeypatch.setattr(torch, "get_device_module", lambda _kind: devices)
        return devices

    return visible


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_numbers_drawn_within_are_drawn_again_after():
    with random_state_kept():
        within = draw()
    assert draw() == within


@pytest.mark.parametrize("saved", [0, 1, 3])
@pytest.mark.parametrize("here", [0, 1, 2, 3])
def test_a_state_is_restored_on_as_many_devices_as_there_are(plug, caplog, saved, here):
    plug(saved)
    state, numbers = random_state(), draw()
    devices = plug(here)
    for i in range(here):
        devices.states[i] += 10
    restore_random_state(state)
    assert draw() == numbers
    assert [int(value) for value in devices.states] == [i if i < saved else i + 10 for i in range(here)]
    assert ("of an uninterrupted training" in caplog.text) == (here < saved)


@pytest.mark.parametrize(
    ("here", "current", "restored"),
    [(1, 0, [3]), (2, 1, [0, 3]), (4, 0, [0, 1, 2, 3]), (5, 3, [0, 1, 2, 3, 14])],
)
def test_the_current_device_goes_on_where_another_number_is_visible(plug, here, current, restored):
    plug(4, current=3)
    state = random_state()
    devices = plug(here, current=current)
    for i in range(here):
        devices.states[i] += 10
    restore_random_state(state)
    assert [int(value) for value in devices.states] == restored


@pytest.mark.parametrize("here", [2, 1])
@pytest.mark.parametrize(
    ("entry", "wrong", "said"),
    [
        (
            "devices",
            [torch.zeros(2, dtype=torch.uint8)] * 2,
            r"for cuda:0: expected torch.uint8 of shape \(1,\)",
        ),
        ("devices", [3, 4], "for cuda:0: .* got 3"),
        ("torch", torch.zeros(3, dtype=torch.uint8), "for torch: .*wrong size|for torch: .*size to be 3"),
        ("python", [3, (), None], "for python"),
        ("numpy", ("MT19937", [1, 2], 0, 0, 0.0), "for numpy"),
    ],
)
def test_an_unusable_entry_is_refused_before_any_generator_changes(plug, entry, wrong, said, here):
    plug(2)
    state, numbers = random_state() | {entry: wrong}, draw()
    devices = plug(here)
    devices.states[0] += 10
    with random_state_kept():
        following = draw()
    for use in (check_random_state, restore_random_state):
        with pytest.raises(ValueError, match=said):
            use(state)
    assert int(devices.states[0]) == 10
    assert draw() == following != numbers


def test_states_of_other_devices_are_left_out(plug, caplog):
    plug(2, "cuda")
    state = random_state()
    devices = plug(2, "xpu")
    devices.states[0] += 10
    restore_random_state(state)
    assert int(devices.states[0]) == 10
    assert "the generators of 2 cuda devices, of which 0 are visible" in caplog.text


def test_a_wrong_state_is_refused_before_any_generator_changes():
    state = random_state()
    del state["numpy"], state["devices"]
    expected = draw()
    random.seed(1)
    with random_state_kept():
        following = draw()
    for use in (check_random_state, restore_random_state):
        with pytest.raises(ValueError, match="got one without devices, numpy"):
            use(state)
    assert draw() == following != expected
