"""Compare a training by a Hugging Face trainer with and without the callback."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from gtcompile import AdaptiveBackpropCallback


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one training."""

    losses: Mapping[int, float]
    """Mean training loss by the step it was logged at."""
    evaluation: float
    """Loss on the evaluation data after the last step."""
    flops: float
    """Share of a full training's FLOPs, by the costs of each step's trained set."""


def make_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The options of all comparisons."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=40, help="steps between selections")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    return parser


def trainer_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments` for all trainings."""
    return {
        "output_dir": str(options.output),
        "max_steps": options.steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "logging_steps": max(1, options.steps // 6),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": options.seed,
        "use_cpu": options.cpu,
    }


def small_llama(options: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    """Four blocks of width 64 with random weights, the same for the same seed."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def compare(options: argparse.Namespace, make_trainer: Callable[[argparse.Namespace], Trainer]) -> None:
    """Train with and without the callback, and print both results side by side."""
    with_callback = make_trainer(options)
    callback = AdaptiveBackpropCallback(options.budget, every=options.every, compiler=options.compiler)
    with_callback.add_callback(callback)
    ours, theirs = run(with_callback), run(make_trainer(options))
    print(f"{'step':>10} {f'budget {options.budget}':>12} {'without':>12}")
    for step, loss in ours.losses.items():
        print(f"{step:>10} {loss:12.4f} {theirs.losses[step]:12.4f}")
    print(f"{'evaluation':>10} {ours.evaluation:12.4f} {theirs.evaluation:12.4f}")
    print(f"{'FLOPs':>10} {ours.flops:12.1%} {theirs.flops:12.1%}")


def run(trainer: Trainer) -> Outcome:
    """Train and evaluate."""
    trainer.train()
    history = trainer.state.log_history
    spent = [e["adaptive/flops_fraction_spent"] for e in history if "adaptive/flops_fraction_spent" in e]
    return Outcome(
        losses={int(entry["step"]): float(entry["loss"]) for entry in history if "loss" in entry},
        evaluation=trainer.evaluate()["eval_loss"],
        flops=spent[-1] if spent else 1.0,
    )
