"""Gradients, FLOPs and a short training against eager PyTorch."""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu.records import Saved
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.sheet import Sheet, against
from benchmarks.workloads import Workload, wide_llama_shape
from benchmarks.zoo.check import MODES, Checked, check, settle
from benchmarks.zoo.models import FURTHER, Architecture, read_architectures
from gtcompile import AdaptiveBackprop, compile_blocks
from gtcompile.tools.bench.baselines import freeze
from gtcompile.tools.bench.measurement import Spread

MODELS = (
    "OPTForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",
    "PhiForCausalLM",
    "GPTNeoXForCausalLM",
    "FalconForCausalLM",
    "BloomForCausalLM",
    "MixtralForCausalLM",
    "Olmo2ForCausalLM",
    "BartForConditionalGeneration",
    "RobertaForCausalLM",
    "MptForCausalLM",
    "StableLmForCausalLM",
    "BertForSequenceClassification",
    "ViTForImageClassification",
)
"""Model classes of transformers, the common ones first."""
DROPOUT, TRAINING = "OPT with dropout", "30 steps with three selections"
STEPS, SELECTIONS, BUDGET = 30, 3, 0.6
LOSSES = 0.02
"""Greatest relative difference of a loss from eager PyTorch's during the short training."""


def units(setting: Setting) -> list[str]:
    """The models in both types, dropout, and the short training."""
    if setting.tiny:
        return [f"{MODELS[0]}, float32", DROPOUT, TRAINING]
    models = [f"{name}, {dtype}" for name in MODELS for dtype in ("float32", "bfloat16")]
    return [DROPOUT, TRAINING, *models]


def measure(setting: Setting, unit: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Check one model, or train for some steps."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    if unit == TRAINING:
        yield _train(setting)
        return
    known = {**read_architectures(FURTHER), **read_architectures()}
    name, _, dtype = unit.partition(", ")
    architecture = _with_dropout(known[MODELS[0]]) if unit == DROPOUT else known[name]
    # the eager compiler is enough for a test on a CPU
    mode = MODES["blocks-eager" if setting.tiny else "blocks-inductor"]
    device = torch.device(setting.device)
    checked = check(architecture, mode, getattr(torch, dtype or "float32"), device)
    yield _plain(settle(architecture, checked, device))


def _with_dropout(architecture: Architecture) -> Architecture:
    values = {**architecture.values, "dropout": 0.1}
    return dataclasses.replace(architecture, values=values, with_dropout=True)


def _plain(checked: Checked) -> dict[str, Any]:
    return {**dataclasses.asdict(checked), "right": checked.right}


def _train(setting: Setting) -> dict[str, Any]:
    """Train a small Llama adaptively, and eagerly with the same sets; compare the losses."""
    workload = Workload(
        shape=wide_llama_shape,
        layers=4,
        hidden=64 if setting.tiny else 256,
        vocabulary=512,
        rows=4,
        length=16 if setting.tiny else 128,
        device=torch.device(setting.device),
        dtype=torch.float32,
    )
    ours, theirs = compile_blocks(workload.model(), **_compiler(setting)), workload.model()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (ours, theirs)]
    adaptive = AdaptiveBackprop(ours, optimizers[0], BUDGET)
    differences = []
    for step in range(STEPS):
        if step % (STEPS // SELECTIONS) == 0:
            selection = adaptive.reselect([_batch(workload, seed) for seed in (1000 + step, 2000 + step)])
            freeze(theirs, selection.trained)
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = model(**_batch(workload, step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        differences.append(abs(losses[0] - losses[1]) / losses[1])
    return {"steps": STEPS, "losses": losses, "loss_differences": differences}


def _compiler(setting: Setting) -> dict[str, Any]:
    return {"compiler": "eager"} if setting.tiny else {}


def _batch(workload: Workload, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(workload.vocabulary, (workload.rows, workload.length), generator=generator)
    return {"input_ids": ids.to(workload.device), "labels": ids.to(workload.device)}


def sheet(saved: Saved) -> Sheet:
    """One row per model and type."""
    results = saved.results
    columns = ("model", "sets", "gradients", "in double precision", "FLOPs, counted - predicted", "")
    models = {unit: row for unit, row in results.items() if unit != TRAINING}
    right = sum(row["right"] for row in models.values())
    exact = sum(row["flops_difference"] == 0 for row in models.values())
    verdicts = [f"gradients right: {right} of {len(models)}", f"FLOPs exact: {exact} of {len(models)}"]
    if trained := results.get(TRAINING):
        found = trained["loss_differences"]
        differences = Spread(max(found), statistics.median(found), max(found))
        verdicts.append(against(f"{TRAINING}: greatest difference of a loss", differences, LOSSES))
    return Sheet(
        title="Correctness: gradients over the largest gradient, against eager PyTorch",
        columns=columns,
        rows=[_cells(unit, row) for unit, row in models.items()],
        verdicts=verdicts,
    )


def _cells(unit: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    double = row["double_difference"]
    return (
        unit,
        str(row["sets"]),
        f"{row['gradient_difference']:.1e}",
        "" if double is None else f"{double:.1e}",
        "" if row["flops_difference"] is None else str(row["flops_difference"]),
        " ".join(filter(None, ("right" if row["right"] else "WRONG", row["failure"]))),
    )
