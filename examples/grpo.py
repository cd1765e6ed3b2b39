"""GRPO with TRL: completions are generated eagerly, and the update costs half of a full one's FLOPs."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

import gtcompile
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS = {
    **{"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 1, "use_cpu": True},
    **{
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
    },
}


def share_of_vowels(completions: list[str], **_: object) -> list[float]:
    """The reward of each completion, in [0, 1]."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def main() -> dict[str, float]:
    """Train for one epoch; returns the last numbers that were logged."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, **SIZES, **SPECIAL)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    callback = gtcompile.AdaptiveBackpropCallback(0.5, compiler="eager")
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=LlamaForCausalLM(config),
            reward_funcs=share_of_vowels,
            args=GRPOConfig(output_dir=folder, num_generations=4, max_completion_length=8, **SETTINGS),
            train_dataset=Dataset.from_dict({"prompt": [f"line {n}: " for n in range(16)]}),
            processing_class=byte_tokenizer(config),
            callbacks=[callback],
        )
        trainer.train()
    for selection in callback.adaptive.history:
        print(selection)
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    return {name: value for name, value in logged.items() if isinstance(value, float)}


if __name__ == "__main__":
    main()
