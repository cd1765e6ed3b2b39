"""Batches to measure importance on, drawn from a trainer's data; training still sees every example."""

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any


def draw_batches(loader: Any, count: int, size: int, seed: str) -> Iterator[dict[str, Any]]:
    """Draw examples from a loader's data set and collate them as the loader does.

    A data set with a length is sampled at random; of any other, the first examples are taken.

    Args:
        loader: a `DataLoader` of the trainer; its `dataset` and `collate_fn` are used.
        count: number of batches.
        size: examples per batch; fewer where the data set is smaller than `count * size`.
        seed: decides which examples are drawn.

    Yields:
        Keyword dictionaries for the model's forward.

    Raises:
        ValueError: with fewer examples than batches, or for data that can be read only once.
        TypeError: when the collator returns something else than a dictionary.
    """
    examples = _draw_examples(loader.dataset, count * size, seed)
    if len(examples) < count:
        raise ValueError(
            f"expected at least {count} training examples to measure importance on, got {len(examples)}"
        )
    share = min(size, len(examples) // count)
    for start in range(0, count * share, share):
        batch = loader.collate_fn(examples[start : start + share])
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"expected the trainer's collator to return a dictionary of the model's arguments, got a "
                f"{type(batch).__name__}; trainers that build their batches later, as TRL's GRPOTrainer "
                f"does, are not supported"
            )
        yield {**batch}


def _draw_examples(data: Any, count: int, seed: str) -> list[Any]:
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        length = len(data)
        chosen = random.Random(seed).sample(range(length), min(length, count))
        return [data[index] for index in chosen]
    if iter(data) is iter(data):
        raise ValueError(
            f"{type(data).__name__}.__iter__ returns the same iterator each time, so measuring importance "
            f"would take examples from the training; have it return a new iterator at each call"
        )
    return list(itertools.islice(iter(data), count))
