"""Generate answers, and score them against all references."""

import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gtcompile.tools.data.batches import Encoded
from gtcompile.tools.data.formats import Metric

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda answered: None,
) -> list[str]:
    """Generate an answer to every prompt by greedy or beam search.

    Args:
        model: the model without compiled code; its training mode is restored.
        tokenizer: of the model.
        prompts: in any order; prompts of similar length share a batch.
        max_new_tokens: most tokens of an answer.
        num_beams: 1 for greedy search.
        batch_size: prompts answered at once.
        on_progress: called with the number of prompts answered so far.

    Returns:
        One answer per prompt, in the order of the prompts.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].prompt))
    with _answering(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = _generate(
                model, tokenizer, [prompts[i].prompt for i in chosen], max_new_tokens, num_beams
            )
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
            on_progress(start + len(chosen))
    return answers


@contextmanager
def _answering(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[tuple[int, ...]],
    max_new_tokens: int,
    num_beams: int,
) -> list[str]:
    """Answer one batch; prompts are padded on the left, so that all answers begin in the same column."""
    length = max(len(prompt) for prompt in prompts)
    pads = [length - len(prompt) for prompt in prompts]
    ids = [[tokenizer.pad_token_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    mask = [[0] * pad + [1] * (length - pad) for pad in pads]
    outputs = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
    )
    answers = outputs if model.config.is_encoder_decoder else outputs[:, length:]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def score(metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score answers, each against its best reference.

    Args:
        metric: `rouge` for ROUGE-1, ROUGE-2 and ROUGE-L (F-measure, stemmed), `exact match`, or `accuracy`
            for answers that were chosen among given ones.
        answers: one per example.
        references: the accepted answers of each example.

    Returns:
        Averages over all examples, in percent.

    >>> score("exact match", ["the Nile."], [["Nile", "River Nile"]])
    {'exact match': 100.0}
    """
    pairs = list(zip(answers, references, strict=True))
    if metric == "exact match":
        return {metric: 100 * fmean(matches(answer, accepted) for answer, accepted in pairs)}
    if metric == "accuracy":
        return {metric: 100 * fmean(answer in accepted for answer, accepted in pairs)}
    from rouge_score.rouge_scorer import RougeScorer  # not where only losses are compared

    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
    results = [scorer.score_multi(list(accepted), answer) for answer, accepted in pairs]
    return {name: 100 * fmean(result[name].fmeasure for result in results) for name in ROUGE_TYPES}


def matches(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer equals a reference, apart from case, articles, punctuation and spaces."""
    return normalise(answer) in {normalise(reference) for reference in accepted}


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces, as in the evaluation of SQuAD.

    >>> normalise("The  Nile.")
    'nile'
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
