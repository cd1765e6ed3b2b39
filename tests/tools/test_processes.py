"""`gtcompile finetune` under torchrun on two gloo ranks: one run, shared examples, stop and resume."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.finetune import final_weights, steps_of
from tests.support.launching import run, torchrun
from tests.tools.test_finetune import settings, without_seconds

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
__all__ = ["settings"]  # a fixture


def command(settings, output: Path, epochs: int) -> list[str]:
    asked = {
        **{"model": settings.model, "dataset": settings.dataset, "output": output, "epochs": epochs},
        **{"batch-size": 2, "lr": 1e-2, "max-length": 48, "max-new-tokens": 8, "budget": 0.6},
    }
    options = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
    return torchrun("-m", "gtcompile", "finetune", *options)


@pytest.mark.slow
def test_two_ranks_share_the_examples_and_one_writes(settings, tmp_path):
    result = run(command(settings, tmp_path / "run", 1))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Written to") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    metrics = steps_of(tmp_path / "run")
    selection = json.loads((tmp_path / "run" / "selections.json").read_text())[0]
    assert summary["processes"] == 2
    assert summary["steps"] == len(metrics) == 5  # 18 examples, twice 2 a step
    assert summary["predicted_flops"] == summary["counted_flops"] == 2 * 5 * selection["step_flops"]
    assert sum(record["flops"] for record in metrics) == summary["predicted_flops"]


@pytest.mark.long
def test_a_stopped_run_resumes_bit_for_bit_and_not_with_another_number_of_ranks(settings, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(command(settings, whole, 6)).returncode == 0
    launched = subprocess.Popen(command(settings, stopped, 6), stdout=subprocess.PIPE, text=True)
    metrics = stopped / "metrics.jsonl"
    while not metrics.is_file() or len(steps_of(stopped)) < 7:
        assert launched.poll() is None
        time.sleep(0.02)
    launched.send_signal(signal.SIGINT)
    said, _ = launched.communicate(timeout=60)
    assert "--resume" in said
    refused = run([sys.executable, "-m", "gtcompile", "finetune", "--resume", str(stopped)])
    assert "the number of processes was 2 and is now 1" in refused.stderr
    assert run(torchrun("-m", "gtcompile", "finetune", "--resume", stopped)).returncode == 0
    metrics = [without_seconds(steps_of(folder)) for folder in (whole, stopped)]
    assert metrics[0] == metrics[1]
    torch.testing.assert_close(final_weights(stopped), final_weights(whole), rtol=0, atol=0)
