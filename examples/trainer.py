"""The Trainer of transformers with the callback: one argument more than without."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gtcompile


def make_data(rows: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of 32 tokens that count upwards by 3."""
    starts = torch.randint(0, 256, (rows, 1))
    tokens = (starts + 3 * torch.arange(32)) % 256
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> dict[str, float]:
    """Train for two epochs at half of the FLOPs; returns the last numbers the callback logged."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    callback = gtcompile.AdaptiveBackpropCallback(0.5, compiler="eager")
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=make_data(160), callbacks=[callback])
        trainer.train()
    for selection in callback.adaptive.history:
        print(selection)
    logged = {name: value for row in trainer.state.log_history for name, value in row.items()}
    return {name: value for name, value in logged.items() if isinstance(value, float)}


if __name__ == "__main__":
    main()
