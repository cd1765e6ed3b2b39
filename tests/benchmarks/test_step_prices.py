"""The benchmark of step prices: bytes within their target, and a row for every set."""

import time

import pytest
import torch

from benchmarks.step_prices import compare, table_of, verdicts
from benchmarks.workloads import Workload, hoisted_blocks, opt_shape
from gtcompile.prices import step_timing


@pytest.mark.slow
def test_every_set_has_a_row_and_its_bytes_are_predicted_within_two_percent(monkeypatch):
    monkeypatch.setattr(step_timing, "ROUNDS", (1, 2))
    workload = Workload(
        shape=opt_shape, layers=3, hidden=64, vocabulary=512, rows=2, length=32,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    candidate = hoisted_blocks(workload, compiler="eager")
    rows = compare(candidate, workload, rounds=2, seed=0, clock=time.process_time)
    assert [row.name for row in rows][:2] == ["everything", "best at 0.5, 0"]
    assert all(abs(row.bytes_error) <= 0.02 for row in rows)
    assert all(row.predicted_s > 0 for row in rows)
    assert table_of("title", rows).row_count == len(rows)
    assert verdicts(rows)[1].startswith("bytes: median error 0.")
