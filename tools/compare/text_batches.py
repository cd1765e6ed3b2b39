"""Texts with answers as token batches, in an order that the seed alone decides."""

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from gtcompile.tools.data.batches import IGNORED, Encoded
from gtcompile.tools.data.formats import END, Example, TaskFormat

Batch = dict[str, torch.Tensor]


class Batches:
    """Turns texts into batches of one shape, so that every step costs the same.

    Args:
        tokenizer: of the model.
        format: of the data: its prompt.
        size: texts in a batch.
        length: tokens of a text; documents are cut and rows padded to it.
        answer_length: most tokens of an answer; longer ones are cut.

    Raises:
        ValueError: the length has no room for a prompt and an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        format: TaskFormat,
        *,
        size: int,
        length: int,
        answer_length: int,
    ) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.answer_length = answer_length
        self._length, self._joint, self._cue = length, format.joint, self._ids(format.cue)
        least = len(self._cue) + answer_length + 2  # a token of the source and the end of the answer
        if length < least:
            raise ValueError(
                f"--length: expected at least {least}, for answers of {answer_length} tokens, got {length}; "
                f"--answer-length makes answers shorter"
            )

    def training(self, texts: Sequence[Example], seed: int) -> Iterator[Batch]:
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

    def held_out(self, texts: Sequence[Example]) -> list[Batch]:
        """The texts in batches; the last one may be smaller."""
        return [self.batch(texts[i : i + self.size]) for i in range(0, len(texts), self.size)]

    def batch(self, texts: Sequence[Example]) -> Batch:
        """Token ids, attention mask and labels, each int64 of shape [texts, length].

        Only the answers have labels; of several references, the first is the answer.
        """
        return self._stacked([self._row(text, text.references[0], self.answer_length) for text in texts])

    def choices(self, text: Example) -> tuple[tuple[str, ...], Batch]:
        """The answers to choose from, the right one first, and a batch with one row for each.

        These answers are cut only where a row has no room for them.
        """
        answers = (*text.references, *text.wrong)
        most = self._length - len(self._cue) - 2
        return answers, self._stacked([self._row(text, answer, most) for answer in answers])

    def prompt(self, text: Example) -> Encoded:
        """A text to be answered; it is cut so that the longest answer ends within the length."""
        room = self._length - len(self._cue) - self.answer_length - 1
        return Encoded((*self._source(text)[:room], *self._cue), ())

    def _stacked(self, rows: Sequence[tuple[list[int], list[int]]]) -> Batch:
        padding = self.tokenizer.pad_token_id
        ids = [[*source, *target] for source, target in rows]
        labels = [[IGNORED] * len(source) + target for source, target in rows]
        return {
            "input_ids": torch.tensor([self._padded(row, padding) for row in ids]),
            "attention_mask": torch.tensor([self._padded([1] * len(row), 0) for row in ids]),
            "labels": torch.tensor([self._padded(row, IGNORED) for row in labels]),
        }

    def _row(self, text: Example, answer: str, most: int) -> tuple[list[int], list[int]]:
        target = [*self._ids(self._joint + answer)[:most], self.tokenizer.eos_token_id]
        return [*self._source(text)[: self._length - len(self._cue) - len(target)], *self._cue], target

    def _source(self, text: Example) -> list[int]:
        """The ids of the text, begun as the tokenizer begins a text."""
        if not isinstance(text.source, str):
            raise TypeError(f"expected a text, got the chat {text.source!r}")
        ids: list[int] = list(self.tokenizer(text.source)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _ids(self, text: str) -> list[int]:
        marked = text.replace(END, self.tokenizer.eos_token)
        ids: list[int] = self.tokenizer(marked, add_special_tokens=False)["input_ids"]
        return ids

    def _padded(self, row: list[int], value: int) -> list[int]:
        return row + [value] * (self._length - len(row))
