"""Trainers of TRL on a tiny model and tiny data, made as their users make them."""

import contextlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from gtcompile import trained_parameters
from gtcompile.graph.flops import count_flops
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer

Build = Callable[..., Trainer]
"""Makes a trainer with the callbacks given."""
CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
QUIET: dict[str, Any] = {
    **{"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "max_grad_norm": 0.0},
    **{"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": [], "bf16": False},
    **{"dataloader_pin_memory": False, "gradient_checkpointing": False},
}
NUMBERS = range(10, 26)


def preferences() -> Dataset:
    """Prompts with a better and a worse answer; every text of one kind has the same length."""
    return Dataset.from_dict(
        {
            "prompt": [f"count {n}:" for n in NUMBERS],
            "chosen": [f" {n + 1} {n + 2}" for n in NUMBERS],
            "rejected": [f" {n + 1} {n + 5}" for n in NUMBERS],
        }
    )


def labelled_answers() -> Dataset:
    """Prompts with one answer each, and whether it is a good one."""
    rows = preferences().to_list()
    texts = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
    answers = [pair for both in zip(texts["chosen"], texts["rejected"], strict=True) for pair in both]
    prompts = [prompt for prompt in texts["prompt"] for _ in range(2)]
    return Dataset.from_dict(
        {"prompt": prompts, "completion": answers, "label": [True, False] * len(texts["prompt"])}
    )


def prompts() -> Dataset:
    return preferences().select_columns(["prompt"])


def texts() -> Dataset:
    return Dataset.from_dict({"text": [row["prompt"] + row["chosen"] for row in preferences()]})


def reward_of_length(completions: list[str], **_: Any) -> list[float]:
    """Any reward that differs between completions."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def building(
    trainer: type[Trainer],
    config: type,
    data: Callable[[], Dataset],
    *,
    model: type = LlamaForCausalLM,
    more: Callable[[], dict[str, Any]] = dict,
    **settings: Any,
) -> Build:
    """Return a function that makes such a trainer on a model which is loaded from a folder.

    Args:
        trainer: the class.
        config: the class of its arguments.
        data: makes the training data.
        model: class of the model, whose weights are random.
        more: makes further arguments of the trainer.
        **settings: of the arguments.
    """

    def build(callbacks: list[TrainerCallback]) -> Trainer:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            tiny: Any = model(CONFIG if model is LlamaForCausalLM else _with_one_label())
            tiny.save_pretrained(folder)
            byte_tokenizer(CONFIG).save_pretrained(folder)
            made: Any = trainer
            return made(
                model=folder,
                args=config(output_dir=folder, **(QUIET | settings)),
                train_dataset=data(),
                callbacks=callbacks,
                **more(),
            )

    return build


def _with_one_label() -> LlamaConfig:
    return LlamaConfig(**(CONFIG.to_dict() | {"num_labels": 1}))


class Spy(TrainerCallback):
    """Notes for every step what is trained, the gradients, and the FLOPs of the loss and its backward."""

    def __init__(self) -> None:
        self.trained: list[frozenset[str]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.flops: list[int] = []

    def watch(self, trainer: Any) -> None:
        """Count from the start of `compute_loss` to the end of the backward, in training steps."""
        step, loss, backward = trainer.training_step, trainer.compute_loss, trainer.accelerator.backward
        stack, counting = contextlib.ExitStack(), False
        counter: Any = None

        def training_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal counting
            counting = True
            try:
                return step(*args, **kwargs)
            finally:
                counting = False

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            nonlocal counter
            if counting:
                counter = stack.enter_context(count_flops())
            return loss(*args, **kwargs)

        def run_backward(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            stack.close()
            self.flops.append(counter.get_total_flops())

        trainer.training_step, trainer.compute_loss = training_step, compute_loss
        trainer.accelerator.backward = run_backward

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.trained.append(trained_parameters(model))
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Frozen(TrainerCallback):
    """Freezes by `requires_grad_` alone, and drops gradients that the trainer's changes of flags leave."""

    def __init__(self, sets: list[frozenset[str]]) -> None:
        self._sets = sets

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            parameter.requires_grad_(name in self._sets[state.global_step])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if name not in self._sets[state.global_step]:
                parameter.grad = None
