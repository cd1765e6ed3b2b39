"""FLOPs of full fine-tuning are those of the base with everything trained, whatever is frozen or added."""

import pytest
import torch
from torch import nn

import gtcompile
from gtcompile.costs.full_finetuning import full_finetuning_flops
from gtcompile.graph.flops import count_flops
from tests.support.models import Regression, make_batch
from tests.support.trainer import make_data, make_model

peft = pytest.importorskip("peft", reason="peft is not installed")


def batch_of(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["input_ids"] for row in make_data(rows)])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def counted(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of an eager step that trains everything."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with count_flops() as counter:
        model(**batch).loss.backward()
    return int(counter.get_total_flops())


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "head too": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "blocks"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_they_are_what_a_step_of_the_base_takes(config, compiled):
    batch = batch_of()
    expected = counted(make_model(), batch)
    model = peft.get_peft_model(make_model(), config())
    if compiled:
        gtcompile.compile_blocks(model, compiler="eager")
    adapters = [name for name, p in model.named_parameters() if p.requires_grad]
    gtcompile.train_only(model, adapters[-1:])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    torch.manual_seed(0)
    output = model(**batch).logits
    assert full_finetuning_flops(model, batch) == expected
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert gtcompile.trained_parameters(model) == set(adapters[-1:])
    torch.manual_seed(0)
    assert torch.equal(model(**batch).logits, output)


def test_adapters_that_are_switched_off_stay_so():
    model = peft.get_peft_model(make_model(), CONFIGS["lora"]())
    with model.disable_adapter():
        full_finetuning_flops(model, batch_of())
        assert all(m.disable_adapters for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    assert not any(m.disable_adapters for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


def test_what_the_user_froze_counts():
    model = Regression()
    full = gtcompile.backward_costs(model, make_batch()).full_flops
    for parameter in model.layers[:2].parameters():
        parameter.requires_grad_(False)
    assert gtcompile.backward_costs(model, make_batch()).full_flops < full
    assert full_finetuning_flops(model, make_batch()) == full


def adapted(policy="best", budget=0.6, **options) -> tuple[nn.Module, gtcompile.AdaptiveBackprop]:
    model = peft.get_peft_model(make_model(), CONFIGS["lora"]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return model, gtcompile.AdaptiveBackprop(model, optimizer, budget, policy=policy, **options)


def batches() -> list[dict[str, torch.Tensor]]:
    rows = batch_of(4)
    return [{name: value[i : i + 2] for name, value in rows.items()} for i in (0, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.55, 0.7, 1.0])
def test_a_step_takes_at_most_this_share_of_full_fine_tuning(budget):
    full = counted(make_model(), batches()[0])
    model, adaptive = adapted(budget=budget, budget_of="full_finetuning")
    selection = adaptive.reselect(batches())
    model.zero_grad()
    with count_flops() as counter:
        model(**batches()[0]).loss.backward()
    taken = counter.get_total_flops()
    assert taken == selection.step_flops <= budget * full
    assert selection.whole_flops == full
    assert selection.step_fraction == adaptive.step_fraction == adaptive.spent_fraction == taken / full
    assert f"{taken / full:.1%} of full fine-tuning's FLOPs (budget {budget:.1%})" in str(selection)
    if budget == 1.0:
        assert selection.step_flops == selection.full_flops


@pytest.mark.slow
def test_the_two_meanings_differ():
    ours = adapted(budget=0.9)[1].reselect(batches())
    theirs = adapted(budget=0.9, budget_of="full_finetuning")[1].reselect(batches())
    assert ours.budget_flops < theirs.budget_flops
    assert "of a full step's FLOPs" in str(ours)


@pytest.mark.slow
def test_a_budget_that_is_too_small_names_what_it_is_a_share_of():
    _, adaptive = adapted(budget=0.01, budget_of="full_finetuning")
    said = r"at least 0\.\d+ of full fine-tuning's FLOPs, 0\.\d+ of them in the forward"
    with pytest.raises(gtcompile.BudgetError, match=said) as told:
        adaptive.reselect(batches())
    _, enough = adapted(budget=told.value.minimum_budget_fraction, budget_of="full_finetuning")
    assert enough.reselect(batches()).trained


@pytest.mark.slow
def test_adapters_that_cost_more_than_full_fine_tuning_are_refused():
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=64, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, 1.0, budget_of="full_finetuning")
    with pytest.raises(gtcompile.BudgetError, match="no budget of full fine-tuning's FLOPs is enough"):
        adaptive.reselect(batches())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sampled", "rotating", "occasionally_full", "function"])
def test_policies_stay_within_it_and_continue(policy):
    shares = []

    def chosen(costs, importance, budget_fraction, generator):
        shares.append(budget_fraction)
        return [max(costs.fqns)]

    given = chosen if policy == "function" else policy
    _, adaptive = adapted(given, 0.6, budget_of="full_finetuning")
    adaptive.reselect(batches())
    for _ in range(3):
        adaptive.step()
        assert adaptive.spent_fraction <= 0.6
    _, again = adapted(given, 0.9)
    again.load_state_dict(adaptive.state_dict())
    assert again.budget_of == "full_finetuning"
    assert [again.step() for _ in range(5)] == [adaptive.step() for _ in range(5)]
    assert again.spent_fraction == adaptive.spent_fraction
    assert all(0.6 < share < 1 for share in shares)


def test_an_unknown_whole_is_refused():
    said = 'expected budget_of="step" or "full_finetuning", got \'adapter\''
    with pytest.raises(ValueError, match=said):
        adapted(budget_of="adapter")
    with pytest.raises(ValueError, match=said):
        gtcompile.AdaptiveBackpropCallback(0.5, budget_of="adapter")


def test_a_quantized_base_is_refused_before_any_work():
    model = Regression()
    model.packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="has no meaning here: packed is quantized"):
        gtcompile.AdaptiveBackprop(model, optimizer, budget_of="full_finetuning")
