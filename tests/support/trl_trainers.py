"""Trainers of TRL and others on a tiny model and tiny data, made as their users make them."""

import contextlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from gtcompile import trained_parameters
from gtcompile.graph.flops import count_flops
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer

SIZES: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
QUIET: dict[str, Any] = {
    **{"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "report_to": []},
    **{"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "bf16": False},
    **{"dataloader_pin_memory": False, "max_grad_norm": 0.0, "gradient_checkpointing": False, "lr_scheduler_type": "constant"},
}


def make_model(kind: type = LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(**(SIZES | changes)))


def tokenizer() -> Any:
    return byte_tokenizer(LlamaConfig(**SIZES))


def preferences(count: int = 16) -> Dataset:
    """Pairs of answers, all of one length."""
    numbers = range(10, 10 + count)
    return Dataset.from_dict(
        {
            "prompt": [f"count {n}:" for n in numbers],
            "chosen": [f" {n + 1} {n + 2}" for n in numbers],
            "rejected": [f" {n - 1} {n + 5}" for n in numbers],
        }
    )


def settings(config: type, **changes: Any) -> Any:
    return config(output_dir=tempfile.mkdtemp(), **(QUIET | changes))


class Spy(TrainerCallback):
    """Notes at every step which parameters are trained, their gradients, and the FLOPs of loss and backward."""

    def __init__(self) -> None:
        self.steps: list[tuple[frozenset[str], dict[str, torch.Tensor], int]] = []
        self._flops = 0
        self._stack: contextlib.ExitStack | None = None
        self._counting = False

    def watch(self, trainer: Trainer) -> None:
        """Count what lies between the start of `compute_loss` and the end of the backward, in training steps."""
        step, loss, backward = trainer.training_step, trainer.compute_loss, trainer.accelerator.backward

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._counting = True
            try:
                return step(*args, **kwargs)
            finally:
                self._counting = False

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            if self._counting:
                self._stack = contextlib.ExitStack()
                self._counter = self._stack.enter_context(count_flops())
            return loss(*args, **kwargs)

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            backward(*args, **kwargs)
            assert self._stack is not None
            self._stack.close()
            self._flops += self._counter.get_total_flops()

        trainer.training_step, trainer.compute_loss = training_step, compute_loss
        trainer.accelerator.backward = run_backward

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append((trained_parameters(model), gradients, self._flops))
        self._flops = 0


def _with_text(kind: type, config: type, data: Callable[[], Dataset], **changes: Any) -> Callable[..., Any]:
    def build(callbacks: list[TrainerCallback], **more: Any) -> Trainer:
        options = dict(changes)
        with tempfile.TemporaryDirectory() as folder:
            options.pop("model", make_model)().save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            own = {name: options.pop(name)() for name in ("ref_model", "peft_config") if name in options}
            own |= {name: options.pop(name) for name in ("reward_funcs",) if name in options}
            return kind(
                model=folder,
                args=settings(config, **(options | more)),
                train_dataset=data(),
                processing_class=tokenizer(),
                callbacks=callbacks,
                **own,
            )

    return build
