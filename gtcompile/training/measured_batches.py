"""Batches to measure importance on, drawn from the training data; training still sees every example."""

import contextlib
import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset

logger = logging.getLogger(__name__)


def first_batches(batches: Iterable[Any], most: int | None) -> Iterable[Any]:
    """Return the first batches, and say so if there are more; one batch alone is refused elsewhere.

    Args:
        batches: several, or by mistake one.
        most: how many; None returns all.
    """
    if most is None or isinstance(batches, Mapping | torch.Tensor):
        return batches
    chosen = list(itertools.islice(batches, most + 1))
    if len(chosen) > most:
        logger.warning(
            "selecting on the first %d batches; max_batches=None takes all that reselect is given", most
        )
    return chosen[:most]


def draw_batches(loader: Any, count: int, size: int, seed: str) -> Iterator[Any]:
    """Draw examples from a loader's data set and collate them as the loader does.

    Args:
        loader: a `DataLoader`; its `dataset` and `collate_fn` are used.
        count: number of batches.
        size: examples per batch; fewer where the data set is smaller than `count * size`.
        seed: decides which examples are drawn.

    Yields:
        Batches as the loader's collator makes them.

    Raises:
        ValueError: with fewer examples than batches, or for data that can be read only once.
    """
    examples = draw_examples(loader.dataset, count * size, seed)
    yield from collate_batches(examples, loader, count, size)


@contextlib.contextmanager
def reseeded(sampler: Any, seed: str) -> Iterator[None]:
    """Within the block, a pass of a sampler draws with this seed; all random states are restored after it.

    Args:
        sampler: draws from torch's default generator or one of its own. It may wrap others, as `sampler` or
            `batch_sampler`.
        seed: decides what it draws.
    """
    generators = [torch.default_generator]
    while sampler is not None:
        if isinstance(own := getattr(sampler, "generator", None), torch.Generator):
            generators.append(own)
        sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(random.Random(seed).getrandbits(63))
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def draw_examples(data: Any, count: int, seed: str) -> list[Any]:
    """Draw examples at random from a data set with a length; take the first ones of any other.

    Raises:
        ValueError: for data that can be read only once.
    """
    by_index = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
    if by_index and hasattr(data, "__len__"):
        length = len(data)
        chosen = random.Random(seed).sample(range(length), min(length, count))
        return [data[index] for index in chosen]
    if iter(data) is iter(data):
        raise ValueError(
            f"{type(data).__name__}.__iter__ returns the same iterator each time, so measuring importance "
            f"would take examples from the training; have it return a new iterator at each call"
        )
    return list(itertools.islice(iter(data), count))


def collate_batches(examples: list[Any], loader: Any, count: int, size: int) -> Iterator[Any]:
    """Collate examples into `count` batches of `size` or fewer examples each.

    Raises:
        ValueError: with fewer examples than batches.
    """
    if len(examples) < count:
        raise ValueError(
            f"expected at least {count} training examples to measure importance on, got {len(examples)}"
        )
    share = min(size, len(examples) // count)
    for start in range(0, count * share, share):
        yield loader.collate_fn(examples[start : start + share])
