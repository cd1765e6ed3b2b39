"""`make demo-real`: SmolLM2-135M learns from 100 abstracts to say what papers found, at half of the FLOPs."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from gtcompile.tools.common.terminal import say
from gtcompile.tools.data.formats import Example
from gtcompile.tools.finetune import Reporter, finetune, generate_answers, show
from gtcompile.tools.models.loading import load_language_model
from gtcompile.tools.runs.preparation import prepare
from gtcompile.tools.runs.run_folder import next_free_folder
from gtcompile.tools.runs.settings import Settings

SETTINGS = Settings(
    model="smollm2",
    dataset="aclsum",
    budget=0.5,
    epochs=3,
    reselect_every=3,
    batch_size=4,
    lr=2e-4,
    max_length=256,
    max_eval_samples=16,
)
"""The data are ACLSum's abstracts and one-sentence outcomes, by people who read the papers."""
SHOWN = 3
"""How many abstracts are answered before and after training, and printed."""
_PRODUCT = (1024, 576, 1536)
"""Rows, inner and outer size of a product as in this model's blocks."""


def main() -> None:
    """Answer some abstracts, fine-tune, and answer them again."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console, folder = Console(), next_free_folder("demo-real")
    try:
        run(_with_faster_dtype(SETTINGS, console), console, folder)
    except ValueError as error:
        say(console, f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:
        say(console, f"{interrupt or 'interrupted'}; gtcompile finetune --resume {folder} continues training")
        raise SystemExit(130) from None


def run(settings: Settings, console: Console, folder: Path) -> None:
    """Fine-tune into a folder, and print answers from before and after.

    Raises:
        ValueError: a package with the model or the data is missing.
    """
    say(console, f"answering {SHOWN} abstracts before training")
    examples, before = answers(settings, settings.model)
    summary = finetune(settings, folder, Reporter(console), evaluate_before=True)
    show(console, [summary], folder)
    _, after = answers(settings, str(folder / "model"))
    for example, *answered in zip(examples, before, after, strict=True):
        console.print(_table(example, *answered))


def answers(settings: Settings, model: str) -> tuple[Sequence[Example], list[str]]:
    """The first abstracts of the evaluation, and a model's answers to them.

    Args:
        settings: of the data.
        model: name or directory of the model.
    """
    prepared = prepare(dataclasses.replace(settings, max_eval_samples=SHOWN), weights=False)
    language = load_language_model(model)
    limit = prepared.max_new_tokens
    texts = generate_answers(language.model, language.tokenizer, prepared.prompts, max_new_tokens=limit)
    return prepared.task.evaluation, texts


def bf16_speed() -> float:
    """How many times faster this processor multiplies matrices in bfloat16 than in float32."""
    rows, inner, outer = _PRODUCT
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, outer, dtype=dtype)
        seconds[dtype] = min(_seconds(left, right) for _ in range(8))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _with_faster_dtype(settings: Settings, console: Console) -> Settings:
    speed = bf16_speed()
    chosen = "bfloat16 autocast" if speed > 1 else "float32"
    say(console, f"matrix products are {speed:.2f} times as fast in bfloat16: training in {chosen}")
    return dataclasses.replace(settings, args={**settings.args, "bf16": True}) if speed > 1 else settings


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.perf_counter()
    left @ right
    return time.perf_counter() - began


def _table(example: Example, before: str, after: str) -> Table:
    table = Table(show_header=False, show_lines=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("abstract", str(example.source))
    table.add_row("before", before)
    table.add_row("after", after)
    table.add_row("a person", example.references[0])
    return table


if __name__ == "__main__":
    main()
