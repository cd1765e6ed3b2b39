"""The callback's exact savings: the same training for fewer FLOPs, and a model that is left as it was."""

import inspect

import pytest
import torch
from transformers import TrainerCallback

from gtcompile import AdaptiveBackpropCallback, GTCompileError, PrefixCache
from gtcompile.training import step_costs
from tests.support.known_costs import capture_costs_once
from tests.support.trainer import (
    Replay,
    Witness,
    adaptive,
    assert_same_weights,
    losses,
    make_data,
    make_model,
    train,
    weights,
)

EPOCHS = {"num_train_epochs": 3, "per_device_train_batch_size": 2}


@pytest.fixture(autouse=True)
def costs_captured_once(monkeypatch):
    capture_costs_once(monkeypatch, step_costs)


def answers_only(count=8):
    """Examples of which only the last two tokens have labels."""
    return [row | {"labels": row["labels"].where(torch.arange(8) >= 6, -100)} for row in make_data(count)]


def last_layers(budget=0.6, **options):
    return adaptive(budget, **{"policy": "last_layers", "every": "epoch", **options})


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Costs(TrainerCallback):
    """Notes the share of FLOPs of a whole step and of a cached one."""

    def __init__(self, callback):
        self.callback = callback

    def on_step_end(self, args, state, control, **kwargs):
        costs = self.callback.adaptive
        self.whole = costs.step_fraction
        self.hit = self.whole * costs.cached_step_flops / costs.step_flops


@pytest.mark.parametrize("bf16", [False, True])
def test_with_the_prefix_cache_training_is_the_same_bit_for_bit_and_computes_less(tmp_path, bf16):
    settings = {"data": make_data(8), "bf16": bf16, **EPOCHS}
    plain = train(tmp_path, last_layers(), **settings)
    callback = last_layers(prefix_cache=True)
    cached = train(tmp_path, callback, costs := Costs(callback), **settings)
    assert_same_weights(weights(plain.model), weights(cached.model))
    assert losses(plain) == losses(cached)
    spent = "adaptive/flops_fraction_spent"
    assert logged(cached, spent) == logged(plain, spent)
    # of twelve steps, four store, the first that finds its examples compares, and seven use them
    computed = logged(cached, "adaptive/flops_fraction_computed")[-1]
    assert computed == pytest.approx((5 * costs.whole + 7 * costs.hit) / 12)
    assert costs.hit < costs.whole


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_with_labelled_logits_gradients_are_those_of_all_logits(tmp_path, prefix_cache, accumulation):
    settings = {"data": answers_only(), "gradient_accumulation_steps": accumulation, **EPOCHS}
    witness, before = Witness(), make_model().get_output_embeddings().weight.shape
    callback = last_layers(labelled_logits=True, prefix_cache=prefix_cache)
    trainer = train(tmp_path, callback, witness, **settings)
    assert all(trained == gradients for trained, gradients in witness.steps)
    replayed = train(tmp_path, Replay([trained for trained, _ in witness.steps]), **settings)
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(losses(replayed)))
    torch.testing.assert_close(weights(trainer.model), weights(replayed.model), rtol=1e-3, atol=1e-4)
    assert trainer.model.get_output_embeddings().weight.shape == before


def test_evaluations_see_all_logits_and_the_model_and_trainer_are_left_as_they_were(tmp_path):
    class Evaluated(Witness):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.steps.append(metrics["eval_loss"])

    witness, model = Evaluated(), make_model()
    settings = {"eval_strategy": "epoch", "data": answers_only()}
    shapes = {"compute_metrics": lambda prediction: {"logits": prediction.predictions.shape[1]}}
    trainer = train(
        tmp_path, last_layers(prefix_cache=True, labelled_logits=True), witness, model=model,
        trainer_settings=shapes, **settings,
    )  # fmt: skip
    assert logged(trainer, "eval_logits") == [8]
    hooks = [hook.__name__ for hook in (*model._forward_pre_hooks.values(), *model._forward_hooks.values())]
    assert hooks == ["notice_replaced_parameters"]  # of `train_only`
    assert model.loss_function.__name__ == "ForCausalLMLoss"
    assert not {"_prepare_inputs", "compute_loss"} & vars(trainer).keys()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(witness.steps[-1])


@pytest.mark.slow
@pytest.mark.parametrize("folder", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_resumed_training_with_both_savings_equals_the_uninterrupted_one_bit_for_bit(tmp_path, folder):
    cache = str(tmp_path / "prefix") if folder else True
    options = {"prefix_cache": cache, "labelled_logits": True}
    settings = {"data": answers_only(), "save_strategy": "steps", "save_steps": 3, **EPOCHS}
    whole = train(tmp_path, last_layers(**options), **settings)
    checkpoint = str(tmp_path / "checkpoint-6")
    resumed = train(tmp_path / "resumed", last_layers(**options), resume=checkpoint, **settings)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert losses(whole) == losses(resumed)
    without = last_layers(labelled_logits=True)
    resumed = train(tmp_path / "without", without, resume=checkpoint, **settings)
    assert_same_weights(weights(whole.model), weights(resumed.model))
    with pytest.raises(ValueError, match="trained with labelled_logits=True, this callback has False"):
        train(tmp_path / "refused", last_layers(), resume=checkpoint, **settings)


def test_a_trainer_that_takes_the_labels_away_is_refused_before_any_work(tmp_path):
    callback = last_layers(labelled_logits=True)
    with pytest.raises(ValueError, match="label_smoothing_factor replaces it"):
        train(tmp_path, callback, label_smoothing_factor=0.1)
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()}
    with pytest.raises(ValueError, match="compute_loss_func replaces it"):
        train(tmp_path, last_layers(labelled_logits=True), trainer_settings=own)


def test_a_model_without_blocks_is_refused_and_left_whole(tmp_path):
    model = make_model(layers=1)
    with pytest.raises(GTCompileError, match="no repeated blocks"):
        train(tmp_path, last_layers(prefix_cache=True), model=model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_constructor_shows_its_options_and_refuses_others():
    parameters = inspect.signature(AdaptiveBackpropCallback).parameters
    assert next(iter(parameters)) == "budget_fraction"
    assert parameters["policy"].default == "best"
    assert {parameters[name].kind for name in list(parameters)[1:]} == {inspect.Parameter.KEYWORD_ONLY}
    for name in parameters:
        assert f"        {name}: " in inspect.getdoc(AdaptiveBackpropCallback).replace("\n    ", "\n        ")
    with pytest.raises(TypeError, match="AdaptiveBackpropCallback has no option 'polcy'; near names: policy"):
        AdaptiveBackpropCallback(0.5, polcy="best")
    with pytest.raises(TypeError, match="expected prefix_cache=True, False or a folder, got <"):
        AdaptiveBackpropCallback(prefix_cache=PrefixCache(make_model()))
    with pytest.raises(TypeError, match="expected labelled_logits=True or False, got 64"):
        AdaptiveBackpropCallback(labelled_logits=64)
