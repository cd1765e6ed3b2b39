"""The example script: the same training with and without one line."""

import json

import pytest

from gtcompile.tools.run_clm import main


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_example_prints_both_runs_beside_each_other(tmp_path, capsys):
    row = json.dumps({"source": ["A sentence of the paper."] * 4, "target": ["Its summary."]})
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join([row] * 32))
    options = ["--steps", "2", "--texts", "32", "--block-size", "16", "--compiler", "eager", "--cpu"]
    main([str(tmp_path), "--output", str(tmp_path / "out"), *options, "--budget", "0.6"])
    printed = capsys.readouterr().out
    flops = next(line.split() for line in printed.splitlines() if line.strip().startswith("FLOPs"))
    assert 30 < float(flops[1].rstrip("%")) <= 60
    assert flops[2] == "100.0%"
