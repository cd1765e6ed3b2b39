"""A reward model with TRL, trained at half of the FLOPs of a full step."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

import gtcompile
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS = {
    **{"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 2, "use_cpu": True},
    **{"logging_strategy": "epoch", "save_strategy": "no", "report_to": [], "disable_tqdm": True},
    **{"bf16": False},
}


def make_data(rows: int) -> Dataset:
    """The better answer is polite."""
    prompts = [f"What is {n} + {n}?" for n in range(rows)]
    answers = {"chosen": " please", "rejected": " !!!"}
    return Dataset.from_dict(
        {"prompt": prompts} | {kind: [f" {2 * n}{end}" for n in range(rows)] for kind, end in answers.items()}
    )


def main() -> dict[str, float]:
    """Train for two epochs; returns the last numbers that were logged."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, num_labels=1, **SIZES, **SPECIAL)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    callback = gtcompile.AdaptiveBackpropCallback(0.5, compiler="eager")
    with tempfile.TemporaryDirectory() as folder:
        trainer = RewardTrainer(
            model=LlamaForSequenceClassification(config),
            args=RewardConfig(output_dir=folder, **SETTINGS),
            train_dataset=make_data(64),
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
