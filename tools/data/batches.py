"""Examples as token ids, and batches of them.

Every batch is padded to the longest training example of the run, rounded up to a multiple of 8, so that all
have one shape and one cost. With examples grouped by length, each is padded to its own longest example
instead. The last batch of an epoch is filled with copies without labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from gtcompile.huggingface.labelled_logits import add_labelled_positions
from gtcompile.tools.data.formats import END, Example, TaskFormat

IGNORED = -100
"""Label of positions without loss."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids."""

    prompt: tuple[int, ...]
    """The decoder's prompt with its cue, or the encoder's input."""
    answer: tuple[int, ...]
    """The first reference, with the end-of-sequence token unless it was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Turns examples into token ids within the length limits."""

    tokenizer: PreTrainedTokenizerBase
    """The tokenizer of the model."""
    format: TaskFormat
    """The format of the dataset, with the prompt's cue."""
    encoder_decoder: bool
    """Whether the model is an encoder-decoder."""
    max_length: int
    """Most tokens of an encoder's input, or of a decoder's prompt and answer together."""
    max_new_tokens: int
    """Most tokens of an answer."""

    def __call__(self, example: Example) -> Encoded:
        """Encode one example. If the source is too long, its end is cut; cue and answer stay whole.

        The parts are tokenized one by one, so that generation gets exactly the prompt of training.
        """
        source = example.source
        if not isinstance(source, str):
            return Encoded(self._chat_prompt(source), self._answer(example.references[0], joint=""))
        if self.encoder_decoder:
            ids = self.tokenizer(self._text(source), truncation=True, max_length=self.max_length)["input_ids"]
            return Encoded(tuple(ids), self._answer(example.references[0], joint=""))
        return Encoded(self._decoder_prompt(source), self._answer(example.references[0], self.format.joint))

    def _chat_prompt(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """The chat as the tokenizer's template writes it, up to the answer; if it is too long, its end."""
        if self.encoder_decoder or not self.tokenizer.chat_template:
            raise ValueError(
                "the data holds chats, for which the model must be a decoder whose tokenizer has a chat "
                "template; name fields of texts with --source-field and --target-field instead"
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tuple(ids[-(self.max_length - self.max_new_tokens) :])

    def _decoder_prompt(self, source: str) -> tuple[int, ...]:
        cue = self._ids(self.format.cue)
        ids = list(self.tokenizer(self._text(source))["input_ids"])
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        room = self.max_length - self.max_new_tokens - len(cue)
        return (*ids[:room], *cue)

    def _answer(self, reference: str, joint: str) -> tuple[int, ...]:
        ids = (*self._ids(joint + reference.strip()), self.tokenizer.eos_token_id)
        return ids[: self.max_new_tokens]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(self._text(text), add_special_tokens=False)["input_ids"])

    def _text(self, text: str) -> str:
        return text.replace(END, self.tokenizer.eos_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Stacks encoded examples into batches."""

    encoder_decoder: bool
    """Whether the model is an encoder-decoder, whose labels are a separate sequence."""
    pad_token: int
    """Token id of the padding, which is masked out of attention and loss."""
    batch_size: int
    """Rows of every batch."""
    input_length: int
    """Columns of `input_ids`; with `grouped`, the most of them."""
    target_length: int
    """Columns of `labels`, or the most of them; for a decoder the same as `input_length`."""
    grouped: bool = False
    """Whether examples are grouped by length, so that a batch needs no more columns than its longest one,
    rounded up to a multiple of 8."""
    positions: int | None = None
    """Labelled positions that every batch names for `only_labelled_logits`; None names none."""

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch of the examples, filled up to `batch_size` with unlabelled copies of the first.

        It is longer than those of training only if an example is, which may happen in evaluation.
        """
        missing = self.batch_size - len(examples)
        inputs = [self._inputs(example) for example in examples]
        targets = [self._labels(example) for example in examples]
        inputs += [inputs[0]] * missing
        targets += [()] * missing
        length = self._columns(max(map(len, inputs)), self.input_length)
        columns = (
            self._columns(max(map(len, targets)), self.target_length) if self.encoder_decoder else length
        )
        batch = {
            "input_ids": torch.tensor([_padded(ids, length, self.pad_token) for ids in inputs]),
            "attention_mask": torch.tensor([_padded([1] * len(ids), length, 0) for ids in inputs]),
            "labels": torch.tensor([_padded(ids, columns, IGNORED) for ids in targets]),
        }
        return batch if self.positions is None else add_labelled_positions(batch, multiple=self.positions)

    def _columns(self, longest: int, usual: int) -> int:
        return _round_up(longest, usual) if self.grouped else max(longest, usual)

    def length_of(self, example: Encoded) -> int:
        """Tokens of an example that become `input_ids`."""
        return len(self._inputs(example))

    def _inputs(self, example: Encoded) -> tuple[int, ...]:
        return example.prompt if self.encoder_decoder else (*example.prompt, *example.answer)

    def _labels(self, example: Encoded) -> tuple[int, ...]:
        if self.encoder_decoder:
            return example.answer
        return (*[IGNORED] * len(example.prompt), *example.answer)

    @property
    def shape(self) -> str:
        """The shape of every batch, in words; with `grouped`, of the largest."""
        most = "up to " if self.grouped else ""
        decoder = f", {most}{self.target_length} answer tokens" if self.encoder_decoder else ""
        logits = "" if self.positions is None else f", logits at {self.positions} of them"
        grouped = ", grouped by length" if self.grouped else ""
        return f"{self.batch_size} x {most}{self.input_length} tokens{decoder}{logits}{grouped}"


def _padded(ids: Sequence[int], length: int, fill: int) -> list[int]:
    return [*ids, *[fill] * (length - len(ids))]


def collator_for(
    examples: Sequence[Encoded],
    *,
    encoder_decoder: bool,
    pad_token: int,
    batch_size: int,
    limit: int,
    labelled: bool = False,
    grouped: bool = False,
) -> Collator:
    """A collator for batches as long as the longest example, rounded up to multiples of 8 up to `limit`.

    With `grouped`, that is the longest of the batch, else of all.

    With `labelled`, they name as many labelled positions as a batch of the longest answers has, rounded up to
    a multiple of 8.
    """
    prompt = max(len(example.prompt) for example in examples)
    answer = max(len(example.answer) for example in examples)
    whole = max(len(example.prompt) + len(example.answer) for example in examples)
    input_length = _round_up(prompt if encoder_decoder else whole, limit)
    most = sum(sorted((len(example.answer) for example in examples), reverse=True)[:batch_size])
    return Collator(
        encoder_decoder=encoder_decoder,
        pad_token=pad_token,
        batch_size=batch_size,
        input_length=input_length,
        target_length=_round_up(answer, limit) if encoder_decoder else input_length,
        grouped=grouped,
        positions=_round_up(most, batch_size * input_length) if labelled else None,
    )


def _round_up(length: int, limit: int) -> int:
    return max(length, min(-(-length // 8) * 8, limit))
