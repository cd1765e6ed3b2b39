"""Batches of a trainer to measure importance on."""

from collections.abc import Iterator, Mapping
from typing import Any

from gtcompile.training import measured_batches


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
    for batch in measured_batches.draw_batches(loader, count, size, seed):
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"expected the trainer's collator to return a dictionary of the model's arguments, got a "
                f"{type(batch).__name__}; trainers that build their batches later, as TRL's GRPOTrainer "
                f"does, are not supported"
            )
        yield {**batch}
