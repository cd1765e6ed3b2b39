"""The benchmark of exact savings: its FLOPs fall with every saving, and its steps run."""

import pytest
import torch

from benchmarks import exact_savings


@pytest.mark.slow
def test_every_saving_leaves_fewer_flops_and_its_step_trains(monkeypatch):
    monkeypatch.setattr(exact_savings, "VOCABULARY", 2048)
    steps = exact_savings.Steps(
        layers=6, rows=1, length=160, budget=0.7, device=torch.device("cpu"), compiler="eager"
    )
    shares = {}
    for trained, kind, share, step in steps.trials():
        step()
        shares[trained, kind] = share
    assert shares["everything", "as ever"] == 1
    assert shares["everything", "labelled logits"] < 1
    last = [share for (trained, _), share in shares.items() if trained == "last layers"]
    assert 0.7 >= last[0] > max(last[1:])
    assert last[-1] == min(last)
