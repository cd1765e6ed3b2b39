"""Every script in examples/ runs, and shows what its docstring says."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
TESTS = Path(__file__).parents[1]


def run(name):
    """What `main()` of an example returns."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_a_plain_loop_learns_within_its_budget(capsys):
    losses = run("plain_loop")
    assert losses[-1] < losses[0]
    assert capsys.readouterr().out.count("(budget 50.0%)") == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_freeze_block_after_block_within_the_budget():
    pytest.importorskip("peft")
    trained, share = run("progressive_lora")
    assert trained == sorted(trained, reverse=True)
    assert len(set(trained)) > 3
    assert 0.75 < share <= 0.8


def test_a_vision_model_has_gradients_of_what_is_trained_alone(capsys):
    trained = run("vision_backend")
    assert trained["half the FLOPs"] < trained["everything"]
    assert trained["biases"] == {name for name in trained["everything"] if name.endswith(".bias")}
    assert "(budget 50.0%)" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_spends_what_the_callback_was_given(capsys):
    logged = run("trainer")
    assert 0.35 < logged["adaptive/flops_fraction_spent"] <= 0.5
    assert capsys.readouterr().out.count("(budget 50.0%)") == 2


def test_a_model_that_returns_logits_and_loss_learns_from_pairs(capsys):
    losses = run("nano_gpt")
    assert losses[-1] < losses[0]
    assert capsys.readouterr().out.count("(budget 50.0%)") == 3


@pytest.mark.filterwarnings("ignore:.*(many workers|logging interval|LeafSpec|sync_dist)")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_lightning_module_learns_within_its_budget(capsys):
    assert run("lightning_module") > 0.9
    assert capsys.readouterr().out.count("(budget 50.0%)") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_loop_with_accelerate_learns_within_its_budget(capsys):
    losses = run("accelerate_loop")
    assert losses[-1] < losses[0]
    assert capsys.readouterr().out.count("(budget 50.0%)") == 3


@pytest.mark.slow
def test_a_recipe_with_its_loss_in_a_method_learns_within_its_budget(capsys):
    losses = run("recipe")
    assert losses[-1] < losses[0]
    assert capsys.readouterr().out.count("(budget 50.0%)") == 3


def test_lower_blocks_cost_more():
    shares = list(run("inspect_costs").values())
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 6


@pytest.mark.slow
def test_a_larger_budget_pays_for_more_of_the_last_blocks():
    result = run("last_layers")
    blocks = [count for count, _ in result.values()]
    assert blocks == sorted(blocks)
    assert blocks[-1] > blocks[0]
    assert all(share <= budget for budget, (_, share) in result.items())


@pytest.mark.slow
def test_the_exported_step_has_gradients_of_the_head_alone():
    shapes = run("onnx_export")
    assert shapes == {"loss": (), "gradient.head.weight": (4, 16), "gradient.head.bias": (4,)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TRL's, of which each release has others
@pytest.mark.parametrize(
    ("example", "budget"),
    [
        ("dpo", 0.5),
        pytest.param("grpo", 0.5, marks=pytest.mark.long),
        pytest.param("reward_model", 0.5, marks=pytest.mark.long),
        pytest.param("qlora", 0.8, marks=pytest.mark.long),
    ],
)
def test_trainers_of_trl_spend_what_the_callback_was_given(example, budget, monkeypatch):
    pytest.importorskip("trl", minversion="1.16")
    if example == "qlora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("CI", "1")  # TRL reports its use over the network elsewhere
    logged = run(example)
    assert 0.8 * budget < logged["adaptive/flops_fraction_spent"] <= budget
    assert logged["train_loss"] < {"dpo": 0.65, "reward_model": 0.65, "qlora": 5.6}.get(example, 1)


def test_every_example_is_short_and_run_by_a_test():
    texts = [path.read_text() for path in TESTS.rglob("test_*.py")]
    for example in EXAMPLES.glob("*.py"):
        assert len(example.read_text().splitlines()) <= 60, example.name
        assert any(f'"{example.stem}' in text for text in texts), f"no test runs {example.name}"
