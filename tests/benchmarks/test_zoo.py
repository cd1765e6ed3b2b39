"""The check of many architectures, on a few of them."""

import dataclasses

import pytest
import torch

from benchmarks.zoo import check as zoo_check
from benchmarks.zoo import results
from benchmarks.zoo.check import MODES, NO_BLOCKS, Checked, check
from benchmarks.zoo.models import FURTHER, example_input, read_architectures
from gtcompile import AdaptiveBackprop, compile_blocks
from gtcompile.capture.model_io import loss_of
from gtcompile.graph.flops import count_flops

ARCHITECTURES = read_architectures()
OTHERS = read_architectures(FURTHER)
DOCUMENTED = {
    "zoo": {"whole-eager": 91, "blocks-eager": 90, "whole-inductor": 91, "blocks-inductor": 90},
    "zoo_further": {"whole-eager": 214, "blocks-eager": 215},
    "zoo_further_inductor": {"whole-inductor": 9, "blocks-inductor": 32},
}
"""Models whose gradients are right, as `docs/measurements.md` has them."""
RIGHT = Checked(
    name="A", family="a", mode="whole-eager", regions=1, parameters=9, sets=3, flops_difference=0, seconds=1.0
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("GPT2LMHeadModel", "whole-eager"),
        ("T5ForConditionalGeneration", "blocks-eager"),
        ("MixtralForCausalLM", "blocks-eager"),
    ],
)
def test_gradients_and_flops_of_different_architectures_are_right(name, mode):
    checked = check(ARCHITECTURES[name], MODES[mode])
    assert checked.right, checked
    assert (checked.sets, checked.flops_difference, checked.failure) == (3, 0, "")


@pytest.mark.slow
def test_a_model_that_branches_on_data_is_selected_for_and_trained():
    architecture = ARCHITECTURES["FSMTForConditionalGeneration"]
    model, batch = compile_blocks(architecture.build(), compiler="eager"), architecture.batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selection = AdaptiveBackprop(model, optimizer, budget_fraction=0.8).reselect([batch, batch])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        with count_flops() as counter:
            model(**batch).loss.backward()
        assert counter.get_total_flops() == selection.step_flops <= selection.budget_flops
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == selection.trained


@pytest.mark.long
@pytest.mark.parametrize("mode", ["whole-eager", "blocks-eager"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES)[::3])
def test_gradients_of_every_third_architecture_are_right(name, mode):
    checked = check(ARCHITECTURES[name], MODES[mode])
    assert checked.right or checked.skipped or zoo_check.plain_failure(ARCHITECTURES[name]), checked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViTMSNForImageClassification", "ErnieForSequenceClassification"])
def test_models_of_other_kinds_are_right(name):
    checked = check(OTHERS[name], MODES["blocks-eager"])
    assert checked.right, checked
    assert (checked.sets, checked.flops_difference, checked.failure) == (3, 0, "")


@pytest.mark.parametrize("name", sorted(OTHERS)[::30])
def test_models_of_other_kinds_build_and_train(name):
    loss = loss_of(OTHERS[name].build()(**OTHERS[name].batch()))
    loss.backward()
    assert loss.isfinite()


def test_an_input_is_what_its_description_says():
    integers = example_input({"shape": [2, 8], "integers": [3, 4]})
    assert integers.shape == (2, 8)
    assert set(integers.flatten().tolist()) == {3, 4}
    normal = example_input({"shape": [1000], "normal": [5, 0.1]})
    assert abs(normal.mean() - 5) < 0.1
    assert example_input([[1, 2]]).tolist() == [[1, 2]]
    assert example_input(True) is True


@pytest.mark.slow
def test_rounding_is_settled_in_double_precision_and_a_wrong_gradient_is_not(monkeypatch):
    rounded = dataclasses.replace(RIGHT, gradient_difference=1e-3)
    assert not rounded.right
    assert dataclasses.replace(rounded, double_difference=1e-9).right
    reference_gradients = zoo_check.reference_gradients
    monkeypatch.setattr(
        zoo_check,
        "reference_gradients",
        lambda m, b: {n: 2 * g for n, g in reference_gradients(m, b).items()},
    )
    wrong = dataclasses.replace(rounded, name="OPTForCausalLM")
    settled = zoo_check.settle(ARCHITECTURES["OPTForCausalLM"], wrong)
    assert settled.double_difference > 0.1
    assert not settled.right


def test_a_wrong_gradient_is_not_called_right(monkeypatch):
    def doubled(model, batch):
        return {name: 2 * gradient for name, gradient in reference_gradients(model, batch).items()}

    reference_gradients = zoo_check.reference_gradients
    monkeypatch.setattr(zoo_check, "reference_gradients", doubled)
    checked = check(ARCHITECTURES["OPTForCausalLM"], MODES["whole-eager"])
    assert checked.sets == 3
    assert not checked.right


def test_a_gradient_too_many_is_not_called_right(monkeypatch):
    monkeypatch.setattr(zoo_check, "train_only", lambda model, trained: None)
    reference = zoo_check.reference_gradients
    monkeypatch.setattr(zoo_check, "reference_gradients", lambda m, b: dict([*reference(m, b).items()][1:]))
    checked = check(ARCHITECTURES["OPTForCausalLM"], MODES["whole-eager"])
    assert not checked.right
    assert "gradients of the wrong parameters" in checked.failure


def test_the_summary_tells_right_from_wrong_and_from_what_does_not_apply():
    wrong = dataclasses.replace(RIGHT, name="B", gradient_difference=0.1)
    skipped = Checked(name="C", family="c", mode="whole-eager", failure=NO_BLOCKS)
    assert results.summary([skipped, wrong, RIGHT]) == [
        "whole-eager: gradients right for 1 of 2 models (1 families, 1 bit for bit); "
        "predicted FLOPs equal to counted for 2"
    ]


def test_results_are_read_as_they_were_written(tmp_path):
    written = [
        RIGHT,
        dataclasses.replace(RIGHT, name="B", gradient_difference=1e-3, double_difference=2e-9),
        dataclasses.replace(RIGHT, name="C", flops_difference=None, failure="not costed: a | b"),
        Checked(name="D", family="d", mode="blocks-eager", failure=NO_BLOCKS),
    ]
    results.write_results(tmp_path / "zoo.jsonl", written[::-1])
    assert results.read_results(tmp_path / "zoo.jsonl") == written


@pytest.mark.parametrize("path", sorted(FURTHER.parent.glob("zoo*.jsonl")), ids=lambda path: path.stem)
def test_committed_results_are_as_the_documentation_sums_them_up(path):
    checked = results.read_results(path)
    assert len({(r.name, r.mode) for r in checked}) == len(checked)
    right = {mode: sum(r.right for r in checked if r.mode == mode) for mode in {r.mode for r in checked}}
    assert right == DOCUMENTED[path.stem]


def test_every_result_is_kept_at_once_and_not_checked_again(tmp_path, monkeypatch):
    calls = []

    def pretend(path, name, family, mode):
        if name == "PhiForCausalLM":
            raise KeyboardInterrupt
        calls.append(name)
        return dataclasses.replace(RIGHT, name=name, mode=mode)

    monkeypatch.setattr(results, "check_in_process", pretend)
    arguments = {"modes": ["whole-eager"], "output": tmp_path / "zoo.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        results.main(models=["OPTForCausalLM", "PhiForCausalLM"], **arguments)
    results.main(models=["OPTForCausalLM", "GPT2LMHeadModel"], **arguments)
    assert calls == ["OPTForCausalLM", "GPT2LMHeadModel"]
    assert [r.name for r in results.read_results(tmp_path / "zoo.jsonl")] == sorted(calls)


def test_a_check_that_fails_is_a_row():
    checked = results.check_in_process(results.ARCHITECTURES, "no such model", "none", "whole-eager")
    assert not checked.right
    assert "no such model" in checked.failure
