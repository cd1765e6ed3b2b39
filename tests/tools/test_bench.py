"""`gtcompile bench`: what it measures on a tiny model, how it judges, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM, ViTConfig
from typer.testing import CliRunner, Result

from gtcompile import BudgetError
from gtcompile.cli import app
from gtcompile.tools.bench.command import bench
from gtcompile.tools.bench.measurement import Timed, alternate, ratios, spread
from gtcompile.tools.bench.options import BenchOptions
from gtcompile.tools.bench.result import Bench, Measured, Overhead, compare
from gtcompile.tools.bench.steady_state import EAGER, HOISTED, PLAIN, Trial
from gtcompile.tools.bench.subject import find_subject
from gtcompile.tools.common.options import BatchShape
from tests.compiler import test_unused_outputs

CPU = torch.device("cpu")
SHAPE = BatchShape(batch_size=2, length=8, target_length=4)


class Perceptron(nn.Module):
    """No repeated blocks, no vocabulary, and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, points: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.last(self.first(points).relu()) - targets).square().mean()


def perceptron() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Perceptron(), {"points": torch.ones(3, 4), "targets": torch.ones(3, 1)}


def lonely() -> nn.Module:
    return Perceptron()


def sized(width: int, /, depth: int = 2, *more: int, bias: bool, **rest: int) -> nn.Module:
    raise AssertionError("called without its arguments")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A configuration alone."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, intermediate_size=32, num_attention_heads=2
    ).save_pretrained(folder)
    return bench(str(folder), BenchOptions(budgets=(0.5, 0.7), compiler="eager", rounds=3, shape=SHAPE))


@pytest.mark.slow
def test_every_candidate_executes_the_predicted_flops(measured: Bench) -> None:
    assert [(m.trial.candidate, m.trial.budget) for m in measured.trials] == [
        (name, budget) for budget in (1.0, 0.5, 0.7) for name in (HOISTED, EAGER)
    ]
    for trial in measured.trials:
        assert trial.counted_flops == trial.predicted_flops <= trial.trial.budget * measured.full_flops
    assert measured.compiled == 0
    assert measured.overhead.capturing > 0
    assert measured.overhead.measuring > 0
    assert measured.overhead.compiling.keys() == {HOISTED}
    assert measured.new_sets.low > 0


def test_less_is_saved_the_less_is_trained(measured: Bench) -> None:
    for name in (HOISTED, EAGER):
        half, more, full = (measured.find(name, budget).saved_bytes for budget in (0.5, 0.7, 1.0))
        assert 0 < half < more < full
    assert measured.find(HOISTED, 0.5).saved_bytes <= measured.find(EAGER, 0.5).saved_bytes


@pytest.mark.slow
def test_the_command_prints_a_table_in_eighty_columns_and_no_seconds(llama: Path) -> None:
    result = run(
        llama, "--budgets", 0.5, "--rounds", 1, "--batch-size", 2, "--length", 8, "--dtype", "bfloat16"
    )
    assert result.exit_code == 0, result.output
    table = [line for line in result.stdout.splitlines() if re.match(r" *(gtcompile|eager)", line)]
    assert len(table) == 4
    assert all(re.search(r"\d\.\d{3} \(\d\.\d{3}\) ", line) and len(line) <= 80 for line in table)
    assert all(re.search(r"\d\.\d\d \(\d+\.\d\d-\d+\.\d\d\)", table[row]) for row in (0, 2, 3))
    assert "…" not in result.stdout
    assert "budget 0.5: undecided, " in result.stdout
    assert "fewer than 5 rounds cannot tell what is faster; raise --rounds" in result.stdout
    assert " ms" not in result.stdout
    assert " M parameters in bfloat16, " in result.stdout


def test_json_holds_the_same_for_a_model_of_ones_own_without_blocks() -> None:
    result = run("tests.tools.test_bench:perceptron", "--budgets", "0.9", "--rounds", 1, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["model"].startswith("tests.tools.test_bench:perceptron: Perceptron, 4.9e-05 M parameters")
    assert [row["budget"] for row in found["trials"]] == [1.0, 1.0, 0.9, 0.9]
    assert all(row["counted_flops"] == row["predicted_flops"] for row in found["trials"])
    assert "seconds" not in found["trials"][0]


def remembering() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return test_unused_outputs.Model(), test_unused_outputs.batch()


def test_what_blocks_compute_beside_the_loss_is_predicted() -> None:
    options = BenchOptions(budgets=(0.8,), compiler="eager", rounds=1)
    measured = bench("tests.tools.test_bench:remembering", options)
    assert [m.counted_flops for m in measured.trials] == [m.predicted_flops for m in measured.trials]


def test_a_copy_shares_the_weights_and_not_what_is_frozen(llama: Path) -> None:
    subject = find_subject(str(llama), CPU, SHAPE)
    one, other = subject.model(), subject.model()
    for p in one.parameters():
        p.requires_grad_(False)
    assert all(p.requires_grad for p in other.parameters())
    for mine, original in zip(one.parameters(), subject.original.parameters(), strict=True):
        assert mine is not original
        assert mine.data_ptr() == original.data_ptr()


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([1.0] * 9, "faster, 0.5 "),
        ([1.0] * 8 + [3.0], "faster, 0.5 "),
        ([1.0] * 7 + [3.0] * 2, "a tie, 0.5 "),
        ([3.0] * 8 + [1.0], "SLOWER, 1.5 "),
        ([2.0] * 9, "a tie, 1 "),
    ],
)
def test_a_difference_counts_where_the_rounds_agree(ours: list[float], verdict: str) -> None:
    assert compare(ours, [2.0] * 9).startswith(verdict)


@pytest.mark.parametrize("time", [1.0, 3.0])
@pytest.mark.parametrize(("rounds", "decided"), [(1, False), (4, False), (5, True)])
def test_a_few_rounds_decide_nothing_even_where_they_agree(time: float, rounds: int, decided: bool) -> None:
    assert compare([time] * rounds, [2.0] * rounds).startswith("undecided, ") != decided


def made_up(step: float, *, counted: int = 10, half: float = 1.0) -> Bench:
    """Everything trained, in steps of so many seconds and so many counted FLOPs of 10; half in `half`."""
    times = {"saved_bytes": 1, "seconds": (step,)}
    of_half = {"predicted_flops": 5, "counted_flops": 5, "saved_bytes": 1, "seconds": (half,)}
    trials = (
        Measured(trial=Trial(HOISTED, 1.0), predicted_flops=10, counted_flops=counted, **times),
        Measured(trial=Trial(EAGER, 1.0), predicted_flops=10, counted_flops=10, **times),
        Measured(trial=Trial(HOISTED, 0.5), **of_half),
        Measured(trial=Trial(EAGER, 0.5), **of_half),
    )
    overhead = Overhead(capturing=1.0, measuring=4.0, selecting=0.5, compiling={HOISTED: 10.0, PLAIN: 6.0})
    words = dict.fromkeys(("subject", "machine", "sets"), "")
    new_sets = spread([1.0])
    return Bench(
        **words,
        full_flops=10,
        trials=trials,
        new_sets=new_sets,
        compiled=0,
        overhead=overhead,
        timed=True,
    )


def test_flops_that_were_not_predicted_are_said() -> None:
    result = made_up(1.0, counted=11)
    assert any("11 FLOPs counted, 10 predicted" in line for line in result.verdicts())
    assert result.as_dict()["trials"][0]["seconds"]["median"] == 1.0


def test_overhead_is_won_back_by_shorter_steps_or_never() -> None:
    result = made_up(2.0, half=1.2)
    assert result.won_back_after(0.5) == 20  # 15.5 seconds, 0.8 a step
    assert result.won_back_after(1.0) is None
    lines = result.verdicts()
    paid = "budget 0.5: compiling and selecting is won back after 20 steps, against eager PyTorch in full"
    assert paid in lines
    assert "everything trained: does not pay: a step takes 1 (1-1) full steps of eager PyTorch" in lines
    assert (
        "overhead in full steps of eager PyTorch: capturing 0.5, measuring 2, selecting 0.25 (4 batches "
        "measured); compiling: gtcompile 5, torch.compile 3"
    ) in lines
    assert result.as_dict()["won_back_after"] == {"1": None, "0.5": 20}


@pytest.mark.parametrize(("step", "said"), [(0.019, True), (0.021, False)])
def test_steps_too_short_to_say_much_are_said_to_be(step: float, said: bool) -> None:
    assert any("these steps are short" in line for line in made_up(step).verdicts()) is said


@pytest.mark.parametrize(
    ("budgets", "said"), [("", "got none"), ("a", "expected numbers"), ("0.5,1", "got 1;"), ("-1", "got -1")]
)
def test_budgets_that_are_no_shares_are_refused(budgets: str, said: str) -> None:
    assert said in refused("demo", f"--budgets={budgets}")


def test_a_budget_below_the_smallest_names_it(llama: Path) -> None:
    with pytest.raises(BudgetError, match="takes at least"):
        bench(str(llama), BenchOptions(budgets=(0.05,), compiler="eager", rounds=1, shape=SHAPE))


def test_models_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    assert "no model in './nowhere'" in refused("./nowhere")
    assert "--length: expected at least 1" in refused("demo", "--length", 0)
    assert "returned a Perceptron and no batch" in refused("tests.tools.test_bench:lonely")
    assert "expected float32 or bfloat16, got 'int8'" in refused("demo", "--dtype", "int8")
    assert "without --dtype" in refused("tests.tools.test_bench:perceptron", "--dtype", "bfloat16")
    ViTConfig().save_pretrained(tmp_path)
    assert "cannot build a causal language model from the ViTConfig" in refused(tmp_path)


@pytest.mark.parametrize("command", [["bench"], ["inspect"], ["export", "--onnx", "step.onnx"]])
def test_a_function_that_needs_arguments_is_refused_in_one_line(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "tests.tools.test_bench:sized"])
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert "called without arguments, but it needs width, bias;" in line


@pytest.mark.parametrize("command", [["bench"], ["export", "--onnx", "step.onnx"]])
def test_rows_beyond_positions_that_are_looked_up_are_refused_in_one_line(
    tmp_path: Path, command: list[str]
) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=8)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, [*command, str(tmp_path), "--length", "9"])
    assert result.exit_code == 2, result.output
    assert result.output == (
        "error: OPTForCausalLM has 8 positions and does not run on 9 tokens; lower --length\n"
    )
    assert find_subject(str(tmp_path), CPU, SHAPE).example["input_ids"].shape == (2, 8)


def test_rows_beyond_positions_that_are_computed_are_measured(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=4).save_pretrained(tmp_path)
    assert find_subject(str(tmp_path), CPU, SHAPE).example["input_ids"].shape == (2, 8)


def test_functions_take_turns_and_prepare_untimed() -> None:
    order: list[str] = []
    functions = {
        name: Timed(lambda name=name: order.append(f"prepare {name}"), lambda name=name: order.append(name))
        for name in "ab"
    }
    times = alternate(functions, 2, CPU, runs=2)
    turn = {name: [f"prepare {name}", name, name] for name in "ab"}
    assert order == [*turn["a"], *turn["b"], *turn["b"], *turn["a"]]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_round_by_round() -> None:
    assert str(ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])) == "2 (1-3)"
    assert spread([3.0, 1.0, 2.0, 4.0]).median == 2.5
