"""What transformers' Trainer and our callback are told, from the settings of a run."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from gtcompile.huggingface.callback import AdaptiveBackpropCallback
from gtcompile.tools.runs.preparation import MEASURED_BATCHES, Prepared
from gtcompile.tools.runs.settings import Settings


def training_arguments(settings: Settings, output: Path) -> Seq2SeqTrainingArguments:
    """The trainer's arguments: those that the settings name, and for the rest the paper's.

    Raises:
        ValueError: transformers refuses a value.
        ImportError: a logger is not installed.
    """
    given: dict[str, Any] = {
        "logging_steps": 10,
        "max_grad_norm": 0.0,
        "per_device_eval_batch_size": settings.batch_size,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "generation_num_beams": settings.num_beams,
        **settings.args,
    }
    limit = given.pop("save_total_limit", 2)
    try:
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(output),
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.lr,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            disable_tqdm=True,
            remove_unused_columns=False,
            save_total_limit=limit and max(limit, 2),  # the last whole one stays until the next is whole
            **given,
        )
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"transformers refuses these arguments: {error}") from error
    if arguments.fsdp or arguments.auto_find_batch_size:
        raise ValueError(
            "finetune trains a whole model in each process, on batches of one size; leave out fsdp and "
            "auto_find_batch_size"
        )
    if missing := set(arguments.report_to or ()) - set(get_available_reporting_integrations()):
        raise ImportError(
            f"report_to={', '.join(sorted(missing))}: not installed, or no logger of transformers; "
            f'TensorBoard comes with pip install "gtcompile[tensorboard]"'
        )
    return arguments


def adaptive_callback(prepared: Prepared) -> AdaptiveBackpropCallback:
    """The callback that selects what is trained, as the settings say."""
    settings, every = prepared.settings, prepared.settings.reselect_every
    full = settings.policy == "full"
    later: Any = "epoch" if every == 1 else every * prepared.steps_per_epoch
    return AdaptiveBackpropCallback(
        1.0 if full else settings.budget,
        budget_seconds=settings.budget_seconds,
        budget_memory=settings.budget_memory,
        budget_of="step" if full else settings.budget_of,
        policy="last_layers" if full else settings.policy,
        every=sys.maxsize if settings.selects_once else later,
        batches=MEASURED_BATCHES,
        compiler=settings.compiler,
        activation_memory_budget=settings.activation_memory_budget,
        prefix_cache=True if settings.prefix_cache == "memory" else settings.prefix_cache or False,
    )
