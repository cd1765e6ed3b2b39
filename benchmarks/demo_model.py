"""Pretrain the demo's decoder, with a seed: how the files in `tools/models/demo` were made.

    python -m benchmarks.demo_model --output DIR

writes them again, on one core in six to ten minutes. The model is a Llama of 8 blocks and one million
parameters, pretrained on `pretraining_corpus` from random weights. It has not seen the demo's summarisation
task.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo_corpus import pretraining_corpus

_CORPUS_SEED = 0
_CORPUS_TEXTS = 12_000
_TOKENS_PER_STEP = 640
_WARMUP_STEPS = 25
_MATRIX_LEARNING_RATE = 0.006
_OTHER_LEARNING_RATE = 0.004


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`; it can encode any other text too, byte by byte if need be.

    Returns:
        A tokenizer of at most 1,024 tokens, with `<s>`, `</s>` and `<pad>`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    """Build the decoder with random weights: 8 blocks, hidden size 96, input and output embeddings tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], *, progress: Progress
) -> None:
    """Train `model` on `texts`, once, in their order, with a linearly falling learning rate.

    The loss is taken on each text's second line, which the first determines for the most part. Matrices are
    trained by Muon, which learns to copy within 200 steps, where AdamW alone had not begun to.

    Args:
        model: Changed in place.
        tokenizer: Its `</s>` is put at each text's end.
        texts: Two lines each, as `pretraining_corpus` gives them.
        progress: Shows a bar with the loss.
    """
    optimizers = _optimizers(model)
    batches = list(_batches(tokenizer, texts))
    schedule = _learning_rate_schedule(len(batches))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    bar = progress.add_task("pretraining", total=len(batches), loss=float("nan"))
    model.train()
    for input_ids, labels in batches:
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
        progress.update(bar, advance=1, loss=loss.item())
    model.train(False)


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    others = [
        parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)
    ]
    return [
        torch.optim.Muon(matrices, lr=_MATRIX_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=_OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _learning_rate_schedule(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step: up for `_WARMUP_STEPS`, then down to 0."""
    return lambda step: min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / steps)


def _batches(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and labels, (texts, tokens) each, with as many texts as fit `_TOKENS_PER_STEP`."""
    group: list[list[int]] = []
    for text in texts:
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if max(map(len, [*group, tokens])) * (len(group) + 1) > _TOKENS_PER_STEP:
            yield _batch(tokenizer, group)
            group = []
        group.append(tokens)
    if group:
        yield _batch(tokenizer, group)


def _batch(tokenizer: PreTrainedTokenizerFast, group: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad `group` on the right; labels are -100 on the padding and up to each text's line break."""
    padding = tokenizer.pad_token_id
    length = max(map(len, group))
    input_ids = torch.tensor([tokens + [padding] * (length - len(tokens)) for tokens in group])
    (line_break,) = tokenizer.encode("\n", add_special_tokens=False)
    first_line = (input_ids == line_break).cumsum(dim=1) == 0
    return input_ids, input_ids.masked_fill(first_line | (input_ids == padding), -100)


def main(
    output: Annotated[Path, typer.Option(help="directory to make; it must not exist, or be empty")],
    texts: Annotated[int, typer.Option(min=1, help="size of the pretraining corpus")] = _CORPUS_TEXTS,
) -> None:
    """Make the demo's tokenizer and pretrained model."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise typer.BadParameter(f"{output} is not an empty directory")
    corpus = pretraining_corpus(_CORPUS_SEED, texts)
    tokenizer = build_tokenizer(corpus)
    model = build_model(tokenizer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        pretrain(model, tokenizer, corpus, progress=progress)
    _save(model, tokenizer, output)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write both to `output`, weights in float16: everything or, when interrupted, nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / output.name
        model.to(torch.float16)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.replace(output)


if __name__ == "__main__":
    typer.run(main)
