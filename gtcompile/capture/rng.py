"""Save and restore the random number generators that a training step may use."""

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)
KEYS = {"torch", "accelerator", "devices", "python", "numpy"}


def random_state() -> dict[str, Any]:
    """Return the states of torch's generators on the CPU and every visible device, Python's and numpy's.

    Returns:
        Strings, numbers, lists and tensors of dtype uint8, which `torch.load(weights_only=True)` reads.
    """
    kind, keys, *rest = np.random.get_state()
    accelerator = _accelerator()
    return {
        "torch": torch.get_rng_state(),
        "accelerator": accelerator,
        "devices": [_get_device_state(accelerator, i) for i in range(_device_count())],
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }


def check_random_state(*states: Mapping[str, Any]) -> None:
    """Check that each state has the keys that `random_state` returns, before anything is restored.

    Raises:
        ValueError: a key is missing; the message names it.
    """
    for state in states:
        if missing := sorted(KEYS - state.keys()):
            raise ValueError(
                f"expected a random state as this version of gtcompile saves it, got one without "
                f"{', '.join(missing)}"
            )


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore every generator.

    A state from several devices can be restored on fewer, or on none: generators of missing devices are
    skipped, with a warning.

    Args:
        state: returned by `random_state`, possibly on another machine.

    Raises:
        ValueError: the state lacks a key; no generator has changed then.
    """
    check_random_state(state)
    kind, keys, *rest = state["numpy"]
    array = (kind, np.array(keys, dtype=np.uint32), *rest)
    devices = state["devices"]
    here = _device_count() if state["accelerator"] == _accelerator() else 0
    if here < len(devices):
        logger.warning(
            "The random state contains the generators of %d %s devices, of which %d are visible: random "
            "numbers on the others will differ from those of an uninterrupted training.",
            len(devices),
            state["accelerator"],
            here,
        )
    torch.set_rng_state(state["torch"])
    for i, value in enumerate(devices[:here]):
        _set_device_state(state["accelerator"], i, value)
    random.setstate(state["python"])
    np.random.set_state(array)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore every generator after the block."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _accelerator() -> str | None:
    """Return the type of the visible devices, such as "cuda"; None if there are none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else device.type


def _device_count() -> int:
    return torch.accelerator.device_count()


def _get_device_state(accelerator: str | None, index: int) -> torch.Tensor:
    module: Any = torch.get_device_module(accelerator)
    state: torch.Tensor = module.get_rng_state(*_which(accelerator, index))
    return state


def _set_device_state(accelerator: str, index: int, state: torch.Tensor) -> None:
    torch.get_device_module(accelerator).set_rng_state(state, *_which(accelerator, index))


def _which(accelerator: str | None, index: int) -> tuple[int, ...]:
    return () if accelerator == "mps" else (index,)  # Apple's module has one device and takes no index
