"""The random number generators a training step may draw from, as values that a checkpoint can hold."""

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
    """The state of torch's generators on the CPU and on every visible device, of Python's and of numpy's.

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
    """Refuse what `random_state` did not return, before anything is restored.

    Raises:
        ValueError: names the missing keys.
    """
    for state in states:
        if missing := sorted(KEYS - state.keys()):
            raise ValueError(
                f"expected a random state as this version of gtcompile saves it, got one without "
                f"{', '.join(missing)}"
            )


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back.

    Generators of devices that are not there now are left out, with a warning: what was saved on several
    devices can be restored on fewer, or on none.

    Args:
        state: what `random_state` returned, possibly on another machine.

    Raises:
        ValueError: for anything else; no generator has changed then.
    """
    check_random_state(state)
    kind, keys, *rest = state["numpy"]
    array = (kind, np.array(keys, dtype=np.uint32), *rest)
    devices = state["devices"]
    here = _device_count() if state["accelerator"] == _accelerator() else 0
    if here < len(devices):
        logger.warning(
            "The random state holds the generators of %d %s devices, and %d of them are here: random numbers "
            "drawn on the others differ from those of an uninterrupted training.",
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
    """Every generator is after the block what it was before."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def _accelerator() -> str | None:
    """The type of the visible devices, such as "cuda"; None without any."""
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
