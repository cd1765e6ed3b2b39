"""Save and restore the random number generators that a training step may use."""

import contextlib
import functools
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")
KEYS = {"torch", "accelerator", "devices", "python", "numpy"}
"""What a state must have; those of earlier versions lack `current`."""


def random_state() -> dict[str, Any]:
    """Return the states of torch's generators on the CPU and every visible device, Python's and numpy's.

    The entry `current` is the index of this process's current device, None without one.

    Returns:
        Strings, numbers, lists and tensors of dtype uint8, which `torch.load(weights_only=True)` reads.
    """
    kind, keys, *rest = np.random.get_state()
    accelerator = _accelerator()
    return {
        "torch": torch.get_rng_state(),
        "accelerator": accelerator,
        "current": _current_device(),
        "devices": [_get_device_state(accelerator, i) for i in range(_device_count())],
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }


def check_random_state(*states: Mapping[str, Any]) -> None:
    """Check that each state can be restored here, before anything is.

    Raises:
        ValueError: a key is missing, or a generator does not take its state; the message names it.
    """
    for state in states:
        if missing := sorted(KEYS - state.keys()):
            raise ValueError(
                f"expected a random state as this version of gtcompile saves it, got one without "
                f"{', '.join(missing)}"
            )
        trials = _tried("devices", functools.partial(_trials, state))
        for name, take in trials.items():
            _tried(name, take)


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore every generator.

    A state from several devices can be restored on fewer, or on none: generators of missing devices are
    skipped, with a warning. Where another number of devices is visible, the current device now continues the
    random numbers of the one that was current.

    Args:
        state: returned by `random_state`, possibly on another machine.

    Raises:
        ValueError: the state lacks a key, or cannot be restored here; no generator has changed then.
    """
    check_random_state(state)
    places = _places(state)
    if len(places) < len(state["devices"]):
        logger.warning(
            "The random state contains the generators of %d %s devices, of which %d are visible: random "
            "numbers on the others will differ from those of an uninterrupted training.",
            len(state["devices"]),
            state["accelerator"],
            len(places),
        )
    torch.set_rng_state(state["torch"])
    for i, value in places.items():
        _set_device_state(state["accelerator"], i, value)
    random.setstate(state["python"])
    np.random.set_state(_numpy_state(state))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore every generator after the block."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _tried(name: str, take: Callable[[], T]) -> T:
    try:
        return take()
    except (LookupError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the random state has an unusable entry for {name}: {error}") from error


def _trials(state: Mapping[str, Any]) -> dict[str, Callable[[], object]]:
    """By generator, a function that raises if the generator would not take its state; none changes one."""
    trials: dict[str, Callable[[], object]] = {
        "torch": lambda: torch.Generator().set_state(state["torch"]),
        "python": lambda: random.Random().setstate(state["python"]),
        "numpy": lambda: np.random.RandomState().set_state(_numpy_state(state)),
    }
    for i, value in _places(state).items():
        name = f"{state['accelerator']}:{i}"
        trials[name] = functools.partial(_compare, value, _get_device_state(state["accelerator"], i))
    return trials


def _compare(value: Any, now: torch.Tensor) -> None:
    """Refuse what is not of the type and size of a generator's state."""
    if not isinstance(value, torch.Tensor) or (value.dtype, value.shape) != (now.dtype, now.shape):
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else value
        raise ValueError(f"expected {now.dtype} of shape {tuple(now.shape)}, got {found}")


def _places(state: Mapping[str, Any]) -> dict[int, Any]:
    """The saved states of devices, by the index of the visible device that takes each.

    Another number of visible devices numbers them differently: a process that used `cuda:3` of four may now
    see that device alone, as `cuda:0`. Then the current devices are matched first.
    """
    saved: list[Any] = state["devices"]
    if state["accelerator"] != _accelerator():
        return {}
    here = list(range(_device_count()))
    if len(here) == len(saved):
        return dict(zip(here, saved, strict=True))
    before = _first(list(range(len(saved))), state.get("current"))
    return {place: saved[i] for place, i in zip(_first(here, _current_device()), before, strict=False)}


def _first(indices: list[int], index: int | None) -> list[int]:
    return sorted(indices, key=lambda other: other != index)


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    kind, keys, *rest = state["numpy"]
    return kind, np.array(keys, dtype=np.uint32), *rest


def _accelerator() -> str | None:
    """Return the type of the visible devices, such as "cuda"; None if there are none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else device.type


def _device_count() -> int:
    return torch.accelerator.device_count()


def _current_device() -> int | None:
    return torch.accelerator.current_device_index() if _device_count() else None


def _get_device_state(accelerator: str | None, index: int) -> torch.Tensor:
    module: Any = torch.get_device_module(accelerator)
    state: torch.Tensor = module.get_rng_state(*_which(accelerator, index))
    return state


def _set_device_state(accelerator: str, index: int, state: torch.Tensor) -> None:
    torch.get_device_module(accelerator).set_rng_state(state, *_which(accelerator, index))


def _which(accelerator: str | None, index: int) -> tuple[int, ...]:
    return () if accelerator == "mps" else (index,)  # Apple's module has one device and takes no index
