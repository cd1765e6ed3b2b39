"""Inputs of small runs of `gtcompile finetune`, and what they leave in their folders."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.runs.settings import Settings


def reporter(stream: StringIO | None = None) -> Reporter:
    """What a run prints to: a stream of 200 columns, by default one that nobody reads."""
    return Reporter(Console(file=stream or StringIO(), width=200))


def tiny_llama(layers: int) -> PreTrainedModel:
    """A Llama without dropout, always with the same random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def short_run(folder: Path, model: PreTrainedModel, **changes: Any) -> Settings:
    """A run of this model on a file of 20 records, 18 of them to learn from, both saved in the folder."""
    model.save_pretrained(folder / "model")
    records = [{"source": f"the number is {n}.", "target": f"it is {n}"} for n in range(20)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    short: dict[str, Any] = {"lr": 1e-2, "max_length": 48, "max_new_tokens": 8}
    return Settings(model=str(folder / "model"), dataset=str(folder / "data.jsonl"), **(short | changes))


def steps_of(output: Path) -> list[dict[str, Any]]:
    """What a run recorded of each of its steps."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(output / "model").state_dict()  # type: ignore[no-any-return]


def assert_same_weights(one: Path, other: Path) -> None:
    own, its = final_weights(one), final_weights(other)
    assert own.keys() == its.keys()
    assert [name for name in own if not torch.equal(own[name], its[name])] == []
