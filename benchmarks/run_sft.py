"""Supervised fine-tuning with TRL's `SFTTrainer`, with and without the callback."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined] # exported lazily

from benchmarks.trainer_comparison import compare, make_parser, small_llama, trainer_settings
from gtcompile.tools.data.formats import Example, TaskFormat
from gtcompile.tools.data.tasks import load_task
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer

VOCABULARY = 2048
"""Tokens, learned from the dialogues to train on."""


def as_completions(examples: Iterable[Example], form: TaskFormat) -> Dataset:
    """Sources as prompts, their first summaries as completions."""
    return Dataset.from_list(
        [
            {"prompt": f"{e.source}{form.cue}", "completion": f"{form.joint}{e.references[0]}"}
            for e in examples
        ]
    )


def learn_tokenizer(config: PretrainedConfig, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer for these texts whose tokens do not reach over the beginning of a word."""
    letters = byte_tokenizer(config)
    letters.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned: PreTrainedTokenizerFast = letters.train_new_from_iterator(texts, config.vocab_size)
    return learned


def make_trainer(options: argparse.Namespace) -> SFTTrainer:
    """The trainer of one run, with TRL's defaults: loss on completions alone, blocks recomputed."""
    model = small_llama(options, VOCABULARY)
    splits = (options.train_split, options.eval_split)
    task = load_task("dialogsum", data_dir=options.data, splits=splits)
    data = as_completions(task.train, task.format)
    texts = (row["prompt"] + row["completion"] for row in data)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**trainer_settings(options), bf16=not options.cpu),
        train_dataset=data,
        eval_dataset=as_completions(task.evaluation, task.format),
        processing_class=learn_tokenizer(model.config, texts),
    )


def main(arguments: list[str] | None = None) -> None:
    """Run with and without the line, and print the two beside each other."""
    parser = make_parser(__doc__, output="runs/sft")
    parser.add_argument("data", type=Path, help="folder with DialogSum's dev.jsonl and test.jsonl")
    parser.add_argument("--train-split", default="dev")
    parser.add_argument("--eval-split", default="test[:20%]")
    compare(parser.parse_args(arguments), make_trainer)


if __name__ == "__main__":
    main()
