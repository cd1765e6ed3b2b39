"""The metric of a data set on held-out texts: of answers that the model generates, or chooses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from gtcompile.tools.compare.text_batches import Batch, Batches
from gtcompile.tools.data.answers import generate_answers, score
from gtcompile.tools.data.batches import IGNORED
from gtcompile.tools.data.formats import Example, Metric


def scores_of(
    model: nn.Module,
    texts: Sequence[Example],
    batches: Batches,
    metric: Metric,
    autocast: AbstractContextManager[Any],
) -> dict[str, float]:
    """Scores by name, in percent; every reference of a text counts.

    Args:
        model: a decoder without compiled code.
        texts: at least one.
        batches: encodes the texts.
        metric: of the data set.
        autocast: entered for the likelihoods of given answers. Answers are generated without it.
    """
    if metric == "accuracy":
        with autocast, torch.no_grad():
            answers = [_likeliest(model, *batches.choices(text)) for text in texts]
    else:
        answers = generate_answers(
            model,  # type: ignore[arg-type]
            batches.tokenizer,
            [batches.prompt(text) for text in texts],
            max_new_tokens=batches.answer_length,
        )
    return score(metric, answers, [text.references for text in texts])


def _likeliest(model: nn.Module, answers: Sequence[str], batch: Batch) -> str:
    """The answer whose tokens together are the most likely; of equally likely ones, the last."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(training)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], ignore_index=IGNORED, reduction="none"
    )
    totals = losses.sum(dim=1).tolist()
    return answers[min(range(len(answers)), key=lambda index: (totals[index], -index))]
