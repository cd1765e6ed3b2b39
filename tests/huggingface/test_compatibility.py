"""Settings of trainers that would undo the selection are refused or repaired."""

import contextlib

import pytest
import torch
from transformers import Trainer, TrainerCallback

import gtcompile
from gtcompile import AdaptiveBackpropCallback
from gtcompile.huggingface.compatibility import check_trainer
from gtcompile.state.trained_set import uses_compiled_code
from tests.support.trainer import adaptive, make_args, make_data, make_model, train


def compiled_outside(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_in_blocks(model):
    return gtcompile.compile_blocks(model, compiler="eager")


@pytest.mark.parametrize("compiled", [compiled_outside, compiled_in_place, compiled_in_blocks])
def test_a_model_that_is_compiled_already_is_refused_and_left_so(tmp_path, compiled):
    model = compiled(make_model())
    with pytest.raises(ValueError, match="the model is compiled already, and AdaptiveBackpropCallback"):
        train(tmp_path, adaptive(), model=model, max_steps=1)
    assert uses_compiled_code(model)


def test_a_second_callback_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one AdaptiveBackpropCallback, got two"):
        train(tmp_path, adaptive(), adaptive(), max_steps=1)


def test_torch_compile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch_compile=True compiles the model a second time"):
        train(tmp_path, adaptive(), max_steps=1, torch_compile=True, torch_compile_backend="eager")


def test_reentrant_checkpointing_is_refused(tmp_path):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="reentrant checkpointing computes gradients in separate"):
        train(tmp_path, adaptive(), max_steps=1, **settings)


@pytest.mark.parametrize(
    ("setting", "reason"), [("is_deepspeed_enabled", "DeepSpeed keeps"), ("is_fsdp_enabled", "version 1")]
)
def test_engines_that_flatten_parameters_are_refused(tmp_path, setting, reason):
    trainer = Trainer(
        model=make_model(),
        args=make_args(tmp_path),
        train_dataset=make_data(4),
        callbacks=[AdaptiveBackpropCallback()],
    )
    setattr(trainer, setting, True)
    with pytest.raises(ValueError, match=reason):
        check_trainer(trainer, AdaptiveBackpropCallback)


class Broken(TrainerCallback):
    """Notes what an embedding's hooks are during training; then fails if told to."""

    def __init__(self, fails):
        self.fails, self.seen = fails, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen = list(kwargs["model"].get_input_embeddings()._forward_hooks.values())
        if self.fails:
            raise RuntimeError("broken")


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_that_make_inputs_require_gradients_are_taken_away_until_training_ends(tmp_path, fails):
    def own(*_):
        pass

    model = make_model()
    embeddings = model.get_input_embeddings()
    model.enable_input_require_grads()
    embeddings.register_forward_hook(own)
    model.enable_input_require_grads()  # PEFT and TRL both do; the first handle is lost
    before, during = list(embeddings._forward_hooks.items()), Broken(fails)
    with contextlib.suppress(RuntimeError):
        train(tmp_path, adaptive(), during, model=model, max_steps=1)
    assert set(during.seen) & set(dict(before).values()) == {own}
    assert list(embeddings._forward_hooks.items()) == before


@pytest.mark.parametrize("failing", ["find_blocks", "compile_blocks", "labelled_logits_only_in"])
def test_what_fails_while_training_begins_leaves_the_model_as_it_was(tmp_path, monkeypatch, failing):
    def fail(*_, **__):
        raise RuntimeError("broken")

    def hooks(model):
        every = ("_forward_hooks", "_forward_pre_hooks")
        found = [each for m in model.modules() for name in every for each in getattr(m, name).items()]
        # `train_only` looks for replaced parameters, after `train_only(model, None)` as well
        return [(key, hook) for key, hook in found if hook.__name__ != "notice_replaced_parameters"]

    model = make_model()
    model.enable_input_require_grads()
    before = hooks(model)
    monkeypatch.setattr(f"gtcompile.huggingface.callback.{failing}", fail)
    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, adaptive(prefix_cache=True, labelled_logits=True), model=model, max_steps=1)
    assert hooks(model) == before
    assert not uses_compiled_code(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_trainers_with_a_loss_of_their_own_are_refused_with_labelled_logits(tmp_path):
    kind = type("FusedTrainer", (Trainer,), {"__module__": "trl.trainer.sft_trainer"})
    with pytest.raises(ValueError, match="FusedTrainer of TRL computes it from the head's weights by itself"):
        kind(
            model=make_model(),
            args=make_args(tmp_path),
            train_dataset=make_data(4),
            callbacks=[AdaptiveBackpropCallback(labelled_logits=True)],
        )
