"""QLoRA with TRL: a base in bitsandbytes' 4 bits, and the adapters that fit a budget."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import gtcompile
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SETTINGS = {
    **{"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 2, "use_cpu": True},
    **{
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
    },
}


def main() -> dict[str, float]:
    """Train for two epochs; returns the last numbers that were logged."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, **SIZES, **SPECIAL)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    callback = gtcompile.AdaptiveBackpropCallback(0.8, compiler="eager")
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        byte_tokenizer(config).save_pretrained(folder)
        # The budget is a share of a full step of this model: its frozen base has no weight gradients.
        trainer = SFTTrainer(
            model=folder,
            args=SFTConfig(output_dir=folder, **SETTINGS),
            train_dataset=Dataset.from_dict({"text": [f"{n}, {n + 1}, {n + 2}" for n in range(100, 164)]}),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[callback],
        )
        trainer.train()
    for selection in callback.adaptive.history:
        print(selection)
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    return {name: value for name, value in logged.items() if isinstance(value, float)}


if __name__ == "__main__":
    main()
