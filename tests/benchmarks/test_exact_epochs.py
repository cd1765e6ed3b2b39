"""The benchmark of whole epochs: every saving leaves fewer FLOPs and the gradients of plain PyTorch."""

import pytest

from benchmarks.exact_epochs import FULL, RUNS, Checks, Comparison
from gtcompile.tools.runs.settings import Settings


@pytest.mark.long
def test_each_saving_saves_and_all_together_save_most():
    data = Settings(model="demo", dataset="demo", max_train_samples=8, max_eval_samples=1, lr=1e-3)
    comparison = Comparison(data, rows=4, epochs=3, budget=0.6, checks=Checks(at_once=True, compare_every=2))
    full = comparison.run(FULL, None)
    runs = {savings.name: comparison.run(savings, comparison.trained) for savings in RUNS}
    shares = {name: run.flops / full.flops for name, run in runs.items()}
    assert all(shares["all three"] < shares[name] < shares["none"] for name in list(shares)[1:-1])
    assert runs["all three"].peak_bytes < runs["none"].peak_bytes < full.peak_bytes
    assert runs["all three"].cached_bytes > 0 == runs["none"].cached_bytes
    assert max(run.difference for run in (full, *runs.values())) < 1e-3
    assert all(abs(run.loss - runs["none"].loss) < 1e-3 for run in runs.values())
