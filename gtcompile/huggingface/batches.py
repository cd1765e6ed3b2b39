"""Batches of a trainer to measure importance on."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import Trainer

from gtcompile.capture.model_io import tensors_of
from gtcompile.huggingface.trainer_loss import unchanged
from gtcompile.training import measured_batches
from gtcompile.training.measured_batches import reseeded


def draw_batches(loader: Any, count: int, size: int, seed: str) -> Iterator[Any]:
    """Draw examples from a loader's data set and collate them as the loader does.

    A data set with a length is sampled at random; of any other, the first examples are taken. If the collator
    leaves the examples as a list, the trainer makes its batches of them later, and may need the order of
    the loader's sampler (several times the same prompt, for example): then this order is kept.

    Args:
        loader: a `DataLoader` of the trainer.
        count: number of batches. There may be fewer lists of examples than that.
        size: examples per batch; fewer where the data set is smaller than `count * size`. A list of examples
            has the loader's own size.
        seed: decides which examples are drawn.

    Yields:
        What the collator returns: keyword dictionaries, or lists of examples.

    Raises:
        ValueError: with fewer examples than batches, or for data that can be read only once.
    """
    for batch in measured_batches.draw_batches(loader, count, size, seed):
        if isinstance(batch, list):
            yield from _lists_of_examples(loader, count, seed)
            return
        yield batch


def batches_of_an_epoch(loader: Any, most: int, seed: str) -> Iterator[dict[str, Any]]:
    """Collate some batches of an epoch, spread evenly over it, as the loader's sampler groups the examples.

    It may be another epoch than the one to come: a sampler that groups examples by length does so anew each
    time.

    Args:
        loader: a `DataLoader` of the trainer.
        most: how many batches, if the epoch has so many.
        seed: decides how a random sampler groups.

    Yields:
        Keyword dictionaries; nothing for data without a length, or if the collator makes something else.
    """
    if loader.batch_sampler is None:
        return
    with reseeded(loader.batch_sampler, seed):
        groups = list(loader.batch_sampler)
    for index in sorted({round(i * len(groups) / most) for i in range(most)} & set(range(len(groups)))):
        batch = loader.collate_fn([loader.dataset[example] for example in groups[index]])
        if not isinstance(batch, Mapping):
            return
        yield {**batch}


def prepared(trainer: Trainer, batches: Iterable[Any], count: int) -> Iterator[dict[str, Any]]:
    """Yield `count` batches that `compute_loss` takes, as the trainer makes them of those of its loader.

    Trainers that generate (TRL's GRPO, RLOO and others) make several of one, and buffer them. They generate
    anew here, and their buffer stays.

    Raises:
        TypeError: the trainer's batches are no dictionaries, or have no tensors.
        ValueError: there are fewer than `count`.
    """
    made = 0
    for batch in itertools.islice(made_of(trainer, batches), count):
        made += 1
        yield batch
    if made < count:
        raise ValueError(
            f"expected training data for {count} different batches to measure importance on, got {made}; "
            f"add examples, or measure on fewer with batches={made}"
        )


def made_of(trainer: Trainer, batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield what the trainer makes of batches of its loader, as many as these give; as `prepared` does."""
    for batch in batches:
        with unchanged(trainer):
            owner: Any = trainer
            if hasattr(owner, "_buffered_inputs"):
                owner._buffered_inputs = None
            inputs = owner._prepare_inputs(batch)
            made = getattr(owner, "_buffered_inputs", None) or [inputs]
        for each in made:
            if not isinstance(each, Mapping) or not tensors_of(each):
                raise TypeError(
                    f"expected {type(trainer).__name__}._prepare_inputs to return a dictionary for "
                    f"compute_loss with tensors in it, got {_said(each)}: a trainer that makes its batches "
                    f"or computes its loss in another method is not supported"
                )
            yield {**each}


def _said(batch: Any) -> str:
    names = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else ""
    return f"a {type(batch).__name__}" + (f" of {names} without any" if names else "")


def _lists_of_examples(loader: Any, count: int, seed: str) -> Iterator[list[Any]]:
    """Draw up to `count` lists of examples in the order of the loader's sampler, each list once."""
    if loader.batch_sampler is None:
        stream = iter(loader.dataset)
        for _ in range(count):
            if examples := list(itertools.islice(stream, loader.batch_size)):
                yield loader.collate_fn(examples)
        return
    drawn: list[list[int]] = []
    with reseeded(loader.batch_sampler, seed):
        for indices in loader.batch_sampler:
            if indices not in drawn:  # samplers repeat a list for several steps with the same examples
                drawn.append(indices)
            if len(drawn) == count:
                break
    for indices in drawn:
        yield loader.collate_fn([loader.dataset[index] for index in indices])
