"""Causal language modelling in the shape of transformers' `run_clm.py`, with and without the callback."""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from benchmarks.trainer_comparison import compare, make_parser, small_llama, trainer_settings
from gtcompile.tools.data.formats import Example
from gtcompile.tools.data.tasks import load_task
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer


def as_texts(examples: Iterable[Example]) -> Dataset:
    """Sources with their first summary."""
    return Dataset.from_list([{"text": f"{e.source} TL;DR {e.references[0]}"} for e in examples])


def group_texts(examples: dict[str, list[list[int]]], block_size: int) -> dict[str, list[list[int]]]:
    """Concatenate token lists and cut them into blocks of equal length; the remainder is left out."""
    joined = list(itertools.chain.from_iterable(examples["input_ids"]))
    starts = range(0, len(joined) - block_size + 1, block_size)
    blocks = [joined[start : start + block_size] for start in starts]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


def make_trainer(options: argparse.Namespace) -> Trainer:
    """The trainer of one run."""
    model = small_llama(options, vocabulary=320)
    tokenizer = byte_tokenizer(model.config)
    splits, limits = ("train", "dev"), (options.texts, options.texts // 8)
    task = load_task("scitldr", data_dir=options.data, splits=splits, limits=limits)

    def prepare(texts: Dataset) -> Dataset:
        tokens = texts.map(lambda rows: {"input_ids": tokenizer(rows["text"])["input_ids"]}, batched=True)
        tokens = tokens.remove_columns([name for name in tokens.column_names if name != "input_ids"])
        return tokens.map(group_texts, batched=True, fn_kwargs={"block_size": options.block_size})

    return Trainer(
        model=model,
        args=TrainingArguments(**trainer_settings(options)),
        train_dataset=prepare(as_texts(task.train)),
        eval_dataset=prepare(as_texts(task.evaluation)),
        data_collator=default_data_collator,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run with and without the line, and print the two beside each other."""
    parser = make_parser(__doc__, output="runs/clm")
    parser.add_argument("data", type=Path, help="folder with SciTLDR's train.jsonl and dev.jsonl")
    parser.add_argument("--texts", type=int, default=800)
    parser.add_argument("--block-size", type=int, default=128)
    compare(parser.parse_args(arguments), make_trainer)


if __name__ == "__main__":
    main()
