"""Make a model, encoded examples and the batch shape from settings: all that can fail before training."""

import hashlib
from array import array
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gtcompile.huggingface.labelled_logits import only_labelled_logits
from gtcompile.tools.data.batches import Collator, Encoded, Encoder, collator_for
from gtcompile.tools.data.causality import check_causal
from gtcompile.tools.data.tasks import Task, load_task
from gtcompile.tools.models.adapters import add_lora
from gtcompile.tools.models.loading import LanguageModel, load_language_model
from gtcompile.tools.runs.settings import Compiler, Settings, source_of

Batch = dict[str, torch.Tensor]
MEASURED_BATCHES = 4
"""Batches whose importances are averaged at a selection, each of one example at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that is ready to start."""

    settings: Settings
    """The settings of the run."""
    task: Task
    """The texts and the metric."""
    language: LanguageModel
    """Model and tokenizer; the model is on `device`."""
    examples: tuple[Encoded, ...]
    """The training examples."""
    prompts: tuple[Encoded, ...]
    """The evaluation examples."""
    collate: Collator
    """Makes batches, of one shape unless examples are grouped by length."""
    max_new_tokens: int
    """Most tokens of an answer."""

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.language.model.device

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; its last batch may be padded with copies."""
        batches = -(-len(self.examples) // (self.settings.batch_size * self.settings.processes))
        return -(-batches // int(self.settings.args.get("gradient_accumulation_steps", 1)))

    @property
    def passes(self) -> int:
        """Forward and backward passes of the whole run, in each process."""
        batches = int(self.settings.args.get("gradient_accumulation_steps", 1))
        steps = int(self.settings.args.get("max_steps", -1))
        return batches * (steps if steps > 0 else self.settings.epochs * self.steps_per_epoch)

    def sample(self) -> Batch:
        """A batch of the first examples, or of those of middle length if they are grouped by it.

        It is on the model's device, and stands for all batches of the run.
        """
        examples, rows = self.examples, self.settings.batch_size
        if self.collate.grouped:
            ordered = sorted(examples, key=self.collate.length_of)
            start = max(0, len(ordered) // 2 - rows // 2)
            examples = tuple(ordered[start:])
        batch = self.collate(examples[:rows])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    @property
    def digest(self) -> str:
        """A hash of all examples as token ids; it changes with the data and with the tokenizer."""
        tokens = hashlib.sha256()
        for example in (*self.examples, *self.prompts):
            for part in (example.prompt, example.answer):
                tokens.update(array("q", (len(part), *part)).tobytes())
        return tokens.hexdigest()

    @property
    def real_tokens(self) -> float:
        """Average share of a batch's positions that hold a token and not padding, if all have one shape."""
        lengths = [self.collate.length_of(example) for example in self.examples]
        return sum(lengths) / (len(lengths) * self.collate.input_length)


def default_device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_compiler() -> Compiler:
    """`inductor` on a GPU; `eager` on a CPU, where compiling takes longer than small runs gain from it."""
    return "inductor" if torch.cuda.is_available() else "eager"


def prepare(settings: Settings, *, weights: bool = True) -> Prepared:
    """Load and encode everything that a run needs.

    Args:
        settings: the run.
        weights: false leaves the model on the meta device, which is enough for its costs.

    Raises:
        ValueError: the data, the model or the tokenizer is missing, or they do not fit each other.
        GTCompileError: labelled logits for a model that is no decoder.
    """
    task = load_task(source_of(settings), (settings.max_train_samples, settings.max_eval_samples))
    torch.manual_seed(settings.seed)  # a head that the checkpoint lacks is initialised now
    language = load_language_model(settings.model, settings.tokenizer, weights=weights)
    if settings.lora is not None:
        adapted: Any = with_adapters(language.model, settings)
        language = replace(language, model=adapted)
    if weights:
        language.model.to(default_device())  # type: ignore[arg-type]
    language.model.config.use_cache = False  # generation turns it on itself
    if settings.args.get("predict_with_generate") and not language.encoder_decoder:
        raise ValueError("predict_with_generate is for encoder-decoders, and this model is a decoder")
    max_new_tokens = settings.max_new_tokens or task.format.max_new_tokens
    encode = Encoder(
        tokenizer=language.tokenizer,
        format=task.format,
        encoder_decoder=language.encoder_decoder,
        max_length=_length_limit(settings, language, max_new_tokens),
        max_new_tokens=max_new_tokens,
    )
    examples = tuple(map(encode, task.train))
    if weights and len(examples) < MEASURED_BATCHES:
        raise ValueError(
            f"a selection needs {MEASURED_BATCHES} training examples at least, the data has {len(examples)}"
        )
    collate = collator_for(
        examples,
        encoder_decoder=language.encoder_decoder,
        pad_token=language.tokenizer.pad_token_id,
        batch_size=settings.batch_size,
        limit=encode.max_length,
        labelled=settings.labelled_logits,
        grouped=settings.grouped,
    )
    if settings.labelled_logits:
        only_labelled_logits(language.model)
    if weights and not language.encoder_decoder:
        check_causal(language.model, examples[0].prompt + examples[0].answer)
    return Prepared(
        settings=settings,
        task=task,
        language=language,
        examples=examples,
        prompts=tuple(map(encode, task.evaluation)),
        collate=collate,
        max_new_tokens=max_new_tokens,
    )


def with_adapters(model: nn.Module, settings: Settings) -> nn.Module:
    """The model with the adapters that the settings name.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has no such layers.
    """
    assert settings.lora is not None
    return add_lora(model, settings.lora, alpha=settings.lora_alpha, targets=settings.targets)


def _length_limit(settings: Settings, language: LanguageModel, max_new_tokens: int) -> int:
    """`max_length`, or less if the model has fewer positions.

    Raises:
        ValueError: there is no room for a prompt and the answer.
    """
    known = getattr(language.model.config, "max_position_embeddings", None)
    positions = known or max(settings.max_length, max_new_tokens)
    limit = min(settings.max_length, positions)
    if language.encoder_decoder and max_new_tokens > positions:
        raise ValueError(
            f"an answer of {max_new_tokens} tokens is longer than the model's {positions} positions; "
            f"lower --max-new-tokens"
        )
    if not language.encoder_decoder and limit - max_new_tokens < 16:
        raise ValueError(
            f"{limit} tokens have no room for a prompt and an answer of {max_new_tokens}; "
            f"raise --max-length or lower --max-new-tokens (the model has {positions} positions)"
        )
    return limit
