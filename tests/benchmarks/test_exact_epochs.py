"""The benchmark of whole epochs: every saving leaves fewer FLOPs and the gradients of plain PyTorch."""

import pytest

from benchmarks.exact_epochs import FULL, RUNS, Comparison


@pytest.mark.long
def test_each_saving_saves_and_all_together_save_most():
    comparison = Comparison(texts=8, rows=4, epochs=3, budget=0.6)
    full = comparison.run(FULL, None)
    runs = {savings.name: comparison.run(savings, comparison.trained) for savings in RUNS}
    shares = {name: run.flops / full.flops for name, run in runs.items()}
    assert all(shares["all three"] < shares[name] < shares["none"] for name in list(shares)[1:-1])
    assert max(run.difference for run in (full, *runs.values())) < 1e-3
    assert all(abs(run.loss - runs["none"].loss) < 1e-3 for run in runs.values())
