"""Trainers of TRL and others: their step costs what is predicted, with the gradients of eager freezing."""

from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForSequenceClassification

from gtcompile import AdaptiveBackpropCallback, BudgetError
from gtcompile.huggingface.batches import draw_batches, prepared

trl = pytest.importorskip("trl", minversion="1.16", reason="another release of TRL has other trainers")
peft = pytest.importorskip("peft")

from tests.support import trl_trainers as tiny  # noqa: E402 # imports trl

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, of which each release has others


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL reports its use over the network elsewhere
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def lora() -> dict[str, Any]:
    return {
        "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    }


def quantized_lora() -> dict[str, Any]:
    pytest.importorskip("bitsandbytes")
    return lora() | {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}


def rewarded() -> dict[str, Any]:
    return {"reward_funcs": tiny.reward_of_length}


def rewarded_lora() -> dict[str, Any]:
    return rewarded() | lora()


GENERATION = {
    **{"num_generations": 2, "max_completion_length": 6},
    "generation_kwargs": {"min_new_tokens": 6},  # completions of one length: every step costs the same
}


def dpo(**options: Any) -> tiny.Build:
    return tiny.building(trl.DPOTrainer, trl.DPOConfig, tiny.preferences, **options)


def grpo(more: Any = rewarded, **options: Any) -> tiny.Build:
    return tiny.building(trl.GRPOTrainer, trl.GRPOConfig, tiny.prompts, more=more, **GENERATION, **options)


def experimental(method: str) -> tiny.Build:
    module = pytest.importorskip(f"trl.experimental.{method.lower()}")
    trainer, config = (getattr(module, f"{method}{kind}") for kind in ("Trainer", "Config"))
    return tiny.building(trainer, config, tiny.preferences)


def reward_model() -> tiny.Build:
    kind = LlamaForSequenceClassification
    return tiny.building(trl.RewardTrainer, trl.RewardConfig, tiny.preferences, model=kind)


CASES = {
    "DPO": (dpo, 0.8),
    "DPO with adapters": (lambda: dpo(more=lora), 0.9),
    "reward": (reward_model, 0.6),
    "GRPO": (grpo, 0.6),
}
LONG = {
    "KTO": (lambda: tiny.building(trl.KTOTrainer, trl.KTOConfig, tiny.labelled_answers), 0.85),
    "DPO without reference": (lambda: dpo(precompute_ref_log_probs=True), 0.6),
    "ORPO": (lambda: experimental("ORPO"), 0.6),
    "CPO": (lambda: experimental("CPO"), 0.6),
    "SFT": (lambda: tiny.building(trl.SFTTrainer, trl.SFTConfig, tiny.texts), 0.55),
    "QLoRA": (lambda: tiny.building(trl.SFTTrainer, trl.SFTConfig, tiny.texts, more=quantized_lora), 0.9),
    "RLOO": (
        lambda: tiny.building(trl.RLOOTrainer, trl.RLOOConfig, tiny.prompts, more=rewarded, **GENERATION),
        0.6,
    ),
    "GRPO in parts": (lambda: grpo(gradient_accumulation_steps=2, num_iterations=2), 0.6),
    "GRPO with adapters": (lambda: grpo(more=rewarded_lora, beta=0.1), 0.9),
}
EVERY_TRAINER = pytest.mark.parametrize(
    ("make", "budget"),
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, id=name, marks=pytest.mark.long) for name, case in LONG.items()),
    ],
)


def run(build: tiny.Build, *callbacks: Any) -> tuple[Any, tiny.Spy]:
    spy = tiny.Spy()
    trainer = build([*callbacks, spy])
    spy.watch(trainer)
    trainer.train()
    return trainer, spy


@pytest.mark.slow
@EVERY_TRAINER
def test_a_step_costs_what_is_predicted_and_has_the_gradients_of_eager_freezing(make, budget):
    build = make()
    callback = AdaptiveBackpropCallback(budget, compiler="eager", batches=2)
    trainer, seen = run(build, callback)
    selection = callback.adaptive.selection
    assert 0 < len(selection.trained) < selection.selectable
    assert seen.trained == [selection.trained] * 2
    assert seen.flops == [selection.step_flops] * 2 * trainer.args.gradient_accumulation_steps
    _, eager = run(build, tiny.Frozen(seen.trained))
    assert seen.gradients[0].keys() == selection.trained
    torch.testing.assert_close(seen.gradients, eager.gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.long
def test_a_reference_without_adapters_thaws_no_frozen_adapter_of_an_eager_model():
    callback = AdaptiveBackpropCallback(0.9, compiled=False, batches=2)
    _, seen = run(dpo(more=lora), callback)
    assert [gradients.keys() for gradients in seen.gradients] == seen.trained
    assert seen.trained == [callback.adaptive.selection.trained] * 2


@pytest.mark.long
def test_checkpointing_as_trl_sets_it_leaves_the_gradients_alone():
    build = dpo(gradient_checkpointing=True)
    _, seen = run(build, AdaptiveBackpropCallback(0.8, compiler="eager", batches=2))
    _, eager = run(build, tiny.Frozen(seen.trained))
    torch.testing.assert_close(seen.gradients, eager.gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.long
def test_a_budget_below_that_of_the_reference_model_is_refused_with_the_smallest_that_works():
    with pytest.raises(
        BudgetError, match=r"0\.5 is too small: a step that trains anything takes at least 0\.6"
    ):
        dpo()([AdaptiveBackpropCallback(0.5, compiled=False, batches=2)]).train()


def test_measuring_generates_anew_and_leaves_the_trainer_as_it_was():
    trainer = grpo(gradient_accumulation_steps=2)([])
    trainer.model.train()
    trainer._metrics["train"]["kept"], trainer._buffered_inputs = [1.0], ["kept"]
    loader = trainer.get_train_dataloader()
    generator = loader.batch_sampler.sampler.generator
    order = generator.get_state()
    made = list(prepared(trainer, draw_batches(loader, 2, 2, "seed"), 4))
    assert len(made) == 4  # two lists of prompts, each in as many parts as a step takes
    assert all(part["completion_ids"].shape == (2, 6) for part in made)
    assert trainer._buffered_inputs == ["kept"]
    assert dict(trainer._metrics["train"]) == {"kept": [1.0]}
    assert trainer.state.num_input_tokens_seen == 0
    assert torch.equal(generator.get_state(), order)
