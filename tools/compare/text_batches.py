"""Documents with summaries as token batches, in an order that the seed alone decides."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from gtcompile.tools.models.demo_data import summarisation_examples

Batch = dict[str, torch.Tensor]
_IGNORED = -100
_PROMPT = " TL;DR: "
_LONGEST_TARGET = 40


@dataclass(frozen=True, slots=True)
class Text:
    """A document and its summary."""

    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Texts to train on and two held-out sets."""

    train: tuple[Text, ...]
    search: tuple[Text, ...]
    """Held out; learning rates are chosen by the loss on them."""
    test: tuple[Text, ...]
    """Held out; reported losses are measured on them."""


def read_scitldr(folder: Path) -> Data:
    """SciTLDR as its authors publish it: `train.jsonl`, `dev.jsonl` and `test.jsonl`.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    return Data(
        train=_read(folder / "train.jsonl"),
        search=_read(folder / "dev.jsonl"),
        test=_read(folder / "test.jsonl"),
    )


def demo_data(count: int = 64) -> Data:
    """Generated texts for the demo model."""
    train, search, test = (
        tuple(Text(row["source"], row["target"]) for row in summarisation_examples(split, count))
        for split in ("train", "validation", "test")
    )
    return Data(train=train, search=search, test=test)


def _read(path: Path) -> tuple[Text, ...]:
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return tuple(Text(" ".join(row["source"]), row["target"][0]) for row in rows)


class Batches:
    """Turns texts into batches of one shape, so that every step costs the same.

    Args:
        tokenizer: of the model.
        size: texts in a batch.
        length: tokens of a text; documents are cut and rows padded to it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, size: int, length: int) -> None:
        self._tokenizer, self.size, self._length = tokenizer, size, length

    def training(self, texts: Sequence[Text], seed: int) -> Iterator[Batch]:
        """Endless batches: one shuffled pass after the other, for every method alike.

        Raises:
            ValueError: there are fewer texts than a batch holds.
        """
        if len(texts) < self.size:
            raise ValueError(
                f"--batch-size: expected at most {len(texts)}, the texts to train on, got {self.size}"
            )
        for epoch in itertools.count():
            order = random.Random(f"{seed} {epoch}").sample(texts, len(texts))
            for start in range(0, len(order) - self.size + 1, self.size):
                yield self.batch(order[start : start + self.size])

    def held_out(self, texts: Sequence[Text], count: int) -> list[Batch]:
        """The first texts in batches."""
        chosen = texts[:count]
        return [self.batch(chosen[i : i + self.size]) for i in range(0, len(chosen), self.size)]

    def batch(self, texts: Sequence[Text]) -> Batch:
        """Token ids, attention mask and labels, each int64 of shape [texts, length].

        Only the summaries have labels.
        """
        rows = [self._row(text) for text in texts]
        padding = self._tokenizer.pad_token_id
        ids = [[*source, *target] for source, target in rows]
        labels = [[_IGNORED] * len(source) + target for source, target in rows]
        return {
            "input_ids": torch.tensor([self._padded(row, padding) for row in ids]),
            "attention_mask": torch.tensor([self._padded([1] * len(row), 0) for row in ids]),
            "labels": torch.tensor([self._padded(row, _IGNORED) for row in labels]),
        }

    def _row(self, text: Text) -> tuple[list[int], list[int]]:
        source, prompt, target = (
            self._tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (text.source, _PROMPT, text.target)
        )
        target = [*target[:_LONGEST_TARGET], self._tokenizer.eos_token_id]
        return [*source[: self._length - len(prompt) - len(target)], *prompt], target

    def _padded(self, row: list[int], value: int) -> list[int]:
        return row + [value] * (self._length - len(row))
