"""Batches of a Lightning trainer's loaders to measure importance on."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from gtcompile.lightning.framework import LightningModule, Trainer
from gtcompile.training.measured_batches import (
    collate_batches,
    draw_batches,
    draw_examples,
    reseeded,
)

WHOLE_DATA = (RandomSampler, SequentialSampler, DistributedSampler)
"""Samplers of exactly these types visit every example. With any other, the sampler chooses what is drawn."""


def measured_batches(trainer: Trainer, module: LightningModule, count: int, seed: str) -> Iterator[Any]:
    """Draw batches from the training data, converted and moved as the trainer does it.

    Args:
        trainer: of a fit under way.
        module: its module, whose hooks of the transfer run.
        count: number of batches.
        seed: decides which examples are drawn.

    Yields:
        Batches as `training_step` takes them.

    Raises:
        TypeError: a loader is no DataLoader.
        ValueError: its size of a batch is unknown, there are too few examples, or they can be read only once.
    """
    for drawn in _draw(trainer.train_dataloader, count, seed):
        batch = trainer.precision_plugin.convert_input(drawn)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _draw(loaders: Any, count: int, seed: str) -> Iterator[Any]:
    """Draw from one loader, or from each in a nested structure, as Lightning combines them."""
    if isinstance(loaders, Mapping):
        parts = zip(*(_draw(loader, count, seed) for loader in loaders.values()), strict=True)
        return (dict(zip(loaders, part, strict=True)) for part in parts)
    if isinstance(loaders, list | tuple):
        parts = zip(*(_draw(loader, count, seed) for loader in loaders), strict=True)
        return (type(loaders)(part) for part in parts)
    if not hasattr(loaders, "dataset") or not hasattr(loaders, "collate_fn"):
        raise TypeError(
            f"expected a DataLoader to draw batches from that importance is measured on, got a "
            f"{type(loaders).__name__}, which may yield each batch only once; wrap its data in a DataLoader"
        )
    return _draw_from(loaders, count, seed)


def _draw_from(loader: Any, count: int, seed: str) -> Iterator[Any]:
    if loader.batch_size is None and loader.batch_sampler is None:  # the data set yields whole batches
        yield from map(loader.collate_fn, draw_examples(loader.dataset, count, seed))
        return
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"expected a DataLoader with a batch_size, or a batch sampler with that attribute; "
            f"{type(loader.batch_sampler).__name__} has none, so the size of the batches that importance is "
            f"measured on is unknown. Set it on the batch sampler"
        )
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if type(sampler) in WHOLE_DATA or isinstance(loader.dataset, IterableDataset):
        yield from draw_batches(loader, count, size, seed)
        return
    examples = [loader.dataset[index] for index in _sampled(sampler, count * size, seed)]
    yield from collate_batches(examples, loader, count, size)


def _sampled(sampler: Any, count: int, seed: str) -> list[Any]:
    """Take the first indices of a pass of a sampler, drawn with this seed.

    A sampler may exclude examples (those of a validation, for example) or weigh them.
    """
    with reseeded(sampler, seed):
        return list(itertools.islice(iter(sampler), count))
