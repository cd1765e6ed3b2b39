"""A small model, data and callbacks for trainings by transformers' Trainer."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gtcompile import AdaptiveBackpropCallback, train_only, trained_parameters


def make_model(dropout=0.0, vocabulary=32, layers=3):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_data(count=24, length=8):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 32, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def make_args(folder, **changes):
    settings = {
        **{"output_dir": str(folder), "per_device_train_batch_size": 2, "num_train_epochs": 1},
        **{"learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True},
        **{"save_strategy": "no", "logging_steps": 1, "dataloader_pin_memory": False},
        **{"lr_scheduler_type": "constant"},
    }
    return TrainingArguments(**(settings | changes))


class Witness(TrainerCallback):
    """Notes, before each optimizer step, which parameters have a gradient and which are to be trained."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        gradients = frozenset(n for n, p in model.named_parameters() if p.grad is not None)
        self.steps.append((trained_parameters(model), gradients))


class Replay(TrainerCallback):
    """Freezes by `requires_grad_` alone what another run had frozen at each step."""

    def __init__(self, sets):
        self.sets = sets

    def on_step_begin(self, args, state, control, **kwargs):
        train_only(kwargs["model"], self.sets[state.global_step])

    def on_train_end(self, args, state, control, **kwargs):
        train_only(kwargs["model"], None)


def adaptive(budget=0.6, **changes):
    return AdaptiveBackpropCallback(budget, **({"compiler": "eager", "batches": 2, "every": 2} | changes))


def train(folder, *callbacks, model=None, data=None, resume=None, trainer_settings=None, **changes):
    model = make_model() if model is None else model
    data = make_data() if data is None else data
    trainer = Trainer(
        model=model,
        args=make_args(folder, **changes),
        train_dataset=data,
        callbacks=list(callbacks),
        **({"eval_dataset": make_data()[:4]} | (trainer_settings or {})),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged_sets(trainer):
    return [entry for entry in trainer.state.log_history if "adaptive/flops_fraction" in entry]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
