"""Runs of `finetune` with examples grouped by length: every batch is counted at its own shape."""

import json
import random
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from gtcompile import backward_costs
from gtcompile.tools.data.batches import Encoded, collator_for
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.finetune.run import finetune
from gtcompile.tools.finetune.training import SeededGroups
from gtcompile.tools.runs.preparation import prepare
from gtcompile.tools.runs.run_record import read_run
from gtcompile.tools.runs.settings import Settings

ROWS = 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A short run of a tiny Llama on texts of very different lengths."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    records = [{"source": "x" * (1 + n * 5 % 37), "target": "y" * (1 + n % 5)} for n in range(20)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Settings(
        model=str(folder / "model"),
        tokenizer="bytes",
        dataset=str(folder / "data.jsonl"),
        policy="last_layers",
        epochs=2,
        batch_size=ROWS,
        lr=1e-2,
        max_length=64,
        max_new_tokens=8,
        budget=0.5,
        args={"train_sampling_strategy": "group_by_length"},
    )


@pytest.mark.slow
def test_flops_are_those_of_the_shapes_that_occurred_and_within_the_budget(
    settings: Settings, tmp_path: Path
) -> None:
    summary = finetune(settings, tmp_path / "run", Reporter(Console(file=StringIO(), width=200)))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    shapes = {step["positions"] for step in steps}
    assert len(shapes) > 2
    model = prepare(settings).language.model.train()
    (trained,) = {tuple(each["trained"]) for each in read_run(tmp_path / "run").selections}
    for positions in shapes:
        ids = torch.ones(ROWS, positions // ROWS, dtype=torch.int64)
        costs = backward_costs(model, {"input_ids": ids, "attention_mask": ids, "labels": ids})
        expected = {(costs.step_flops(trained), costs.full_flops)}
        assert {(s["flops"], s["full_flops"]) for s in steps if s["positions"] == positions} == expected
    assert all(step["flops"] == step["counted_flops"] for step in steps)
    assert summary.predicted_flops == summary.counted_flops
    assert summary.predicted_flops <= 0.5 * summary.full_flops
    assert summary.real_tokens > prepare(replace(settings, args={})).real_tokens
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_batch_is_as_long_as_its_longest_example_rounded_up() -> None:
    examples = [Encoded((1,) * n, (2, 2)) for n in (3, 9, 30)]
    collate = collator_for(examples, encoder_decoder=False, pad_token=0, batch_size=2, limit=64, grouped=True)
    assert collate(examples[:1])["input_ids"].shape == (2, 8)
    assert collate(examples[:2])["labels"].shape == (2, 16)
    assert collate(examples)["input_ids"].shape[1] == 32
    assert collate.shape == "2 x up to 32 tokens, grouped by length"


def test_the_order_of_an_epoch_follows_from_the_seed_and_the_epoch_alone() -> None:
    lengths = random.Random(0).choices(range(50), k=400)
    sampler = SeededGroups(4, lengths, seed=3)
    orders = []
    for epoch in (0, 1, 1, 0):
        sampler.set_epoch(epoch)
        torch.rand(epoch + 1)
        orders.append(list(sampler))
    assert orders[0] == orders[3] != orders[1] == orders[2]
    assert sorted(orders[0]) == list(range(400))
