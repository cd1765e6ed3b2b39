"""The example scripts: the same training with and without one line."""

import json

import pytest

from benchmarks import run_clm

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def assert_only_the_budget_saves(printed):
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert 30 < float(lines["FLOPs"][0].rstrip("%")) <= 60
    assert lines["FLOPs"][1] == "100.0%"
    assert lines["evaluation"][0] != lines["evaluation"][1]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def test_causal_language_modelling_prints_both_runs_beside_each_other(tmp_path, capsys):
    row = {"source": ["A sentence of the paper."] * 4, "target": ["Its summary."]}
    write(tmp_path / "train.jsonl", [row] * 32)
    write(tmp_path / "dev.jsonl", [row] * 32)
    options = ["--steps", "2", "--texts", "32", "--block-size", "16", "--compiler", "eager", "--cpu"]
    run_clm.main([str(tmp_path), "--output", str(tmp_path / "out"), *options, "--budget", "0.6"])
    assert_only_the_budget_saves(capsys.readouterr().out)


def test_supervised_fine_tuning_prints_both_runs_beside_each_other(tmp_path, capsys):
    pytest.importorskip("trl", reason="trl is not installed")
    from benchmarks import run_sft

    dialogue = "#Person1#: Is the report done?\n#Person2#: Number {} is."
    talk = [{"dialogue": dialogue.format(n), "summary": f"Report {n} is done."} for n in range(32)]
    write(tmp_path / "dev.jsonl", talk)
    write(tmp_path / "test.jsonl", [{"dialogue": r["dialogue"], "summary1": r["summary"]} for r in talk])
    options = ["--steps", "2", "--compiler", "eager", "--cpu", "--budget", "0.6"]
    run_sft.main([str(tmp_path), "--output", str(tmp_path / "out"), *options])
    assert_only_the_budget_saves(capsys.readouterr().out)
