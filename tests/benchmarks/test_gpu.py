"""The benchmark for a GPU at the smallest sizes on a CPU: it keeps what it has, and continues."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from benchmarks.gpu import account, energy, plans, steps, tables, two_gpus
from benchmarks.gpu.candidates import GRAPHED, MAKERS, refusal
from benchmarks.gpu.command import PRELOAD, main
from benchmarks.gpu.kernels import kind_of
from benchmarks.gpu.records import Header, Saved
from benchmarks.gpu.setting import SHORT, Setting
from benchmarks.gpu.stages import STAGES, with_needs
from benchmarks.processes import Ended, Job, Result, run_jobs
from gtcompile.training.cuda_graphs import check_recordable
from tests.support.jobs import count_up, die, fail, loop, start_another

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--output"]


@pytest.mark.slow
def test_jobs_say_what_they_found_and_how_they_ended():
    jobs = [Job("count", count_up, (2,)), Job("fail", fail, ()), Job("die", die, ())]
    assert list(run_jobs(jobs, limit_s=120, preload=PRELOAD)) == [
        Result("count", 0),
        Result("count", 1),
        Ended("count", ""),
        Result("fail", "a part"),
        Ended("fail", "RuntimeError: it broke"),
        Ended("die", "the process died with exit code 3"),
    ]


def test_jobs_that_do_not_end_are_stopped_and_the_others_not_started():
    jobs = [Job("loop", loop, ()), Job("count", count_up, (2,))]
    start = time.monotonic()
    messages = run_jobs(jobs, limit_s=4)
    assert [message for message in messages if isinstance(message, Ended)] == [
        Ended("loop", "stopped: out of time"),
        Ended("count", "not started: out of time"),
    ]
    assert time.monotonic() - start < 60


def test_a_job_that_is_stopped_takes_its_own_jobs_with_it():
    found = None
    for message in run_jobs([Job("one", start_another, ())], limit_s=60):
        if isinstance(message, Result):
            found = message.value
            break  # which stops what still runs
    assert found is not None
    end = time.monotonic() + 30
    while Path(f"/proc/{found}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{found}").exists()


def test_a_stage_brings_those_that_it_reads():
    assert with_needs(["account"]) == ["plans", "steps", "compilation", "account"]
    assert with_needs(["quality"]) == ["quality"]
    order = list(STAGES)
    assert all(order.index(need) < order.index(s.name) for s in STAGES.values() for need in s.needs)


@pytest.mark.slow
def test_what_was_measured_is_kept_and_not_measured_again(tmp_path, capsys):
    main(tmp_path, only=["correctness"], tiny=True, commit="abc")
    path = tmp_path / "correctness.json"
    saved = json.loads(path.read_text())
    assert saved["header"]["commit"] == "abc"
    assert set(saved["finished"]) == set(saved["results"])
    assert not saved["failures"]
    # a unit that was lost is measured again, and nothing else is
    lost, *_ = (unit for unit in saved["finished"] if unit.endswith("float32"))
    changed = {unit: {**result, "failure": "as it was"} for unit, result in saved["results"].items()}
    finished = [unit for unit in saved["finished"] if unit != lost]
    path.write_text(json.dumps(saved | {"results": changed, "finished": finished}))
    capsys.readouterr()
    main(tmp_path, only=["correctness"], tiny=True, commit="abc")
    assert "correctness: 1 to measure" in capsys.readouterr().out
    again = json.loads(path.read_text())["results"]
    assert {unit for unit in again if again[unit] != changed[unit]} == {lost}
    assert f"| {lost} | 3 | 0.0e+00 |  | 0 | right |" in tables.markdown(tmp_path)
    with pytest.raises(typer.BadParameter, match="choose another folder"):
        main(tmp_path, only=["correctness"], tiny=True, commit="def")


@pytest.mark.long
def test_a_whole_run_at_the_smallest_sizes(tmp_path):
    main(tmp_path, tiny=True, minutes=30, commit="abc")
    for name, stage in STAGES.items():
        saved = json.loads((tmp_path / f"{name}.json").read_text())
        assert not saved["failures"], saved["failures"]
        assert saved["results"], stage
    correct = json.loads((tmp_path / "correctness.json").read_text())["results"]
    assert all(row["right"] and row["flops_difference"] == 0 for row in correct.values() if "right" in row)
    assert max(correct["30 steps with three selections"]["loss_differences"]) < 1e-5
    written = tables.markdown(tmp_path)
    assert written.count("\n## ") == len(STAGES)
    assert "captures and compilations after the first set, 0: met" in written


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_killed_loses_nothing_and_leaves_no_process(tmp_path, how):
    process = subprocess.Popen([*COMMAND, str(tmp_path), "--only", "correctness"], cwd=ROOT, text=True)
    path = tmp_path / "correctness.json"
    while process.poll() is None and (not path.exists() or not json.loads(path.read_text())["finished"]):
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(30) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    before = json.loads(path.read_text())
    assert before["finished"]
    time.sleep(2)
    assert str(tmp_path) not in subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout
    assert subprocess.run([*COMMAND, str(tmp_path), "--only", "correctness"], cwd=ROOT).returncode == 0
    after = json.loads(path.read_text())
    assert after["results"].items() >= {u: before["results"][u] for u in before["finished"]}.items()


def test_the_limits_of_all_stages_are_eight_minutes():
    assert sum(stage.weight for stage in STAGES.values()) == 8 * 60


ABSENT = ("datasets", "rouge_score", "trl", "gguf", "matplotlib", "onnx", "onnxscript", "lightning", "aclsum")
"""Packages that a machine with a GPU need not have."""


@pytest.mark.slow
def test_no_stage_needs_more_than_a_machine_with_a_gpu_has():
    hidden = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    needed = "import benchmarks.gpu.command, benchmarks.gpu.tables, gtcompile.tools.compare.command"
    run = subprocess.run(
        [sys.executable, "-c", f"{hidden}; {needed}"], cwd=ROOT, capture_output=True, text=True
    )
    assert not run.returncode, run.stderr


def test_an_unknown_stage_is_refused_before_any_work(tmp_path):
    with pytest.raises(typer.BadParameter, match="known are correctness, plans"):
        main(tmp_path / "new", only=["speed"])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("unit", [two_gpus.REPLICATED, two_gpus.SHARDED, two_gpus.MIXED])
def test_two_ranks_compute_the_gradients_of_eager_pytorch_in_the_same_wrapper(tmp_path, unit):
    setting = Setting(output=tmp_path, device="cpu", tiny=True)
    (plan,) = plans.measure(setting, SHORT, 0.0)
    header = Header(card="a CPU", tiny=True, commit="abc", versions={})
    Saved(folder=tmp_path, stage="plans", header=header, results={SHORT: plan}).write()
    *_, found = two_gpus.measure(setting, unit, deadline=0.0)
    assert found["gradient_difference"] <= (0.03 if unit == two_gpus.MIXED else 1e-6)
    assert [(row["candidate"], row["budget"]) for row in found["trials"]] == list(two_gpus.TRIALS)
    assert all(len(row["step_s"]) == two_gpus.ROUNDS[0] for row in found["trials"])
    table = two_gpus.sheet(Saved(folder=tmp_path, stage="two_gpus", header=header, results={unit: found}))
    assert len(table.rows) == len(two_gpus.TRIALS)
    assert ": right (at most" in table.verdicts[0]


def test_where_there_is_one_gpu_the_stage_for_two_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (found,) = two_gpus.measure(Setting(output=tmp_path, device="cuda"), two_gpus.REPLICATED, deadline=0.0)
    header = Header(card="a GPU", tiny=False, commit="abc", versions={})
    saved = Saved(folder=tmp_path, stage="two_gpus", header=header, results={two_gpus.REPLICATED: found})
    saved.write()
    assert json.loads((tmp_path / "two_gpus.json").read_text())["results"]["DDP"]["skipped"]
    assert two_gpus.sheet(saved).verdicts == ["DDP was not measured: 2 GPUs are needed, and 1 can be seen"]


def row(candidate: str, budget: float, flops: int, seconds: float, peak: int = 100) -> steps.Measured:
    times = {"host_s": [seconds / 2] * 3, "step_s": [seconds] * 3}
    counts = {"counted_flops": flops, "predicted_flops": flops, "peak_bytes": peak, "failure": ""}
    return {"candidate": candidate, "budget": budget, **times, **counts}


def test_steps_are_held_against_their_targets():
    trials = [
        row("gtcompile", 1.0, 100, 1.0),
        row("eager PyTorch", 1.0, 100, 1.5, peak=90),
        row("torch.compile, blocks", 1.0, 100, 1.0),
        row("LoRA, eager", 1.0, 70, 0.9),
        row("LoRA, torch.compile, blocks", 1.0, 70, 0.8),
        row("gtcompile", 0.5, 50, 0.54),
    ]
    measured = {"tokens": 10, "full_flops": 100, "trials": trials}
    lines = list(steps._verdicts("llama-1b", measured))
    assert [line.rpartition(": ")[2].split()[0] for line in lines] == ["met", "MISSED", "MISSED", "met"]
    assert not list(steps._verdicts("qwen3-0.6b", measured))


def test_the_account_says_after_how_many_steps_it_pays(tmp_path):
    dear = account.Account("full", 0.0, 0.0, 0.0, 0.1)
    ours = account.Account("ours", 5.0, 20.0, 4.98, 0.05)
    assert ours.total_s(cold=True) == pytest.approx(20 + 5 * (4.98 + 498 * 0.05))
    assert ours.pays_after(dear) == pytest.approx(20 / (0.1 - 0.05 - 0.01))
    assert dear.pays_after(ours) is None
    assert account.accounts(tmp_path, {}) == []
    assert SHORT in STAGES["account"].module.units(None)  # type: ignore[arg-type]


def test_a_cpu_has_no_counter_of_energy():
    assert energy.joules_counter("cpu") is None


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("void pytorch_flash::flash_bwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("triton_red_fused_native_layer_norm_backward_3", "generated by Inductor"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<8>", "others"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert kind_of(kernel) == kind


def test_a_cpu_measures_every_way_except_cuda_graphs():
    refused = {way: refusal(way, torch.device("cpu")) for way in MAKERS}
    assert {way for way, reason in refused.items() if reason} == {GRAPHED}
    with pytest.raises(ValueError, match=refused[GRAPHED]):
        check_recordable(torch.nn.Linear(1, 1), torch.optim.SGD([torch.ones(1)]), processes=1)
