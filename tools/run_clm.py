"""Causal language modelling in the shape of transformers' `run_clm.py`, with and without the callback."""

import argparse
import itertools
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from gtcompile import AdaptiveBackpropCallback
from gtcompile.tools.byte_tokenizer import byte_tokenizer


def read_texts(folder: Path, split: str) -> Dataset:
    """SciTLDR's sources with their first summary, from `train.jsonl` or `dev.jsonl`."""
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return Dataset.from_list([{"text": f"{_join(r['source'])} TL;DR {_first(r['target'])}"} for r in rows])


def group_texts(examples: dict[str, list[list[int]]], block_size: int) -> dict[str, list[list[int]]]:
    """Concatenate token lists and cut them into blocks of equal length; the remainder is left out."""
    joined = list(itertools.chain.from_iterable(examples["input_ids"]))
    starts = range(0, len(joined) - block_size + 1, block_size)
    blocks = [joined[start : start + block_size] for start in starts]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


def make_trainer(options: argparse.Namespace, budget: float | None) -> Trainer:
    """The trainer of one run: without a budget, the script as it was before the callback."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(vocab_size=320, hidden_size=64, intermediate_size=192, num_hidden_layers=4)
    config.num_attention_heads = config.num_key_value_heads = 4
    model, tokenizer = LlamaForCausalLM(config), byte_tokenizer(config)

    def prepare(texts: Dataset) -> Dataset:
        tokens = texts.map(lambda rows: {"input_ids": tokenizer(rows["text"])["input_ids"]}, batched=True)
        tokens = tokens.remove_columns([name for name in tokens.column_names if name != "input_ids"])
        return tokens.map(group_texts, batched=True, fn_kwargs={"block_size": options.block_size})

    args = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=max(1, options.steps // 6),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=options.seed,
        use_cpu=options.cpu,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=prepare(read_texts(options.data, "train").select(range(options.texts))),
        eval_dataset=prepare(read_texts(options.data, "dev").select(range(options.texts // 8))),
        data_collator=default_data_collator,
    )
    if budget is not None:  # the one line
        trainer.add_callback(AdaptiveBackpropCallback(budget, every=options.every, compiler=options.compiler))
    return trainer


def run(options: argparse.Namespace, budget: float | None) -> dict[str, object]:
    """Train and evaluate; loss by step, evaluation loss and share of a full training's FLOPs."""
    trainer = make_trainer(options, budget)
    trainer.train()
    history = trainer.state.log_history
    spent = [e["adaptive/flops_fraction_spent"] for e in history if "adaptive/flops_fraction_spent" in e]
    return {
        "losses": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        "eval_loss": trainer.evaluate()["eval_loss"],
        "flops": spent[-1] if spent else 1.0,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with SciTLDR's train.jsonl and dev.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/clm"))
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=40, help="steps between selections")
    parser.add_argument("--texts", type=int, default=800)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run with and without the line, and print the two beside each other."""
    options = parse(arguments)
    with_line, without = run(options, options.budget), run(options, None)
    print(f"{'step':>10} {f'budget {options.budget}':>12} {'without':>12}")
    assert isinstance(with_line["losses"], dict)
    assert isinstance(without["losses"], dict)
    for step, loss in with_line["losses"].items():
        print(f"{step:>10} {float(loss):12.4f} {float(without['losses'][step]):12.4f}")
    print(f"{'evaluation':>10} {with_line['eval_loss']:12.4f} {without['eval_loss']:12.4f}")
    print(f"{'FLOPs':>10} {with_line['flops']:12.1%} {without['flops']:12.1%}")


def _join(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)


def _first(value: str | list[str]) -> str:
    return value if isinstance(value, str) else value[0]


if __name__ == "__main__":
    main()
