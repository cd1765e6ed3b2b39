"""DPO with TRL at half of the FLOPs of a full step; the reference runs once, before training."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

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
    numbers = range(rows)
    answers = {
        "chosen": [f" {2 * n} please" for n in numbers],
        "rejected": [f" {2 * n} !!!" for n in numbers],
    }
    return Dataset.from_dict({"prompt": [f"What is {n} + {n}?" for n in numbers]} | answers)


def main() -> dict[str, float]:
    """Train for two epochs; returns the last numbers that were logged."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, **SIZES, **SPECIAL)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    callback = gtcompile.AdaptiveBackpropCallback(0.5, compiler="eager")
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        byte_tokenizer(config).save_pretrained(folder)
        # The budget counts the reference model's forward in every step: 0.5 would pay for nothing else.
        trainer = DPOTrainer(
            model=folder,
            args=DPOConfig(output_dir=folder, precompute_ref_log_probs=True, **SETTINGS),
            train_dataset=make_data(64),
            callbacks=[callback],
        )
        trainer.train()
    for selection in callback.adaptive.history:
        print(selection)
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    return {name: value for name, value in logged.items() if isinstance(value, float)}


if __name__ == "__main__":
    main()
