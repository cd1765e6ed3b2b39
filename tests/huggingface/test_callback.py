"""The callback in transformers' Trainer: what is trained, logged, saved and refused."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from gtcompile import (
    AdaptiveBackpropCallback,
    BudgetError,
    GTCompileError,
    compile_blocks,
    trained_parameters,
)
from gtcompile.capture.pristine_model import uses_compiled_code
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer
from gtcompile.training import step_costs
from tests.support.known_costs import capture_costs_once
from tests.support.trainer import (
    Replay,
    Witness,
    adaptive,
    assert_same_weights,
    logged_sets,
    losses,
    make_args,
    make_data,
    make_model,
    train,
    weights,
)


@pytest.fixture(autouse=True)
def costs_captured_once(monkeypatch):
    capture_costs_once(monkeypatch, step_costs)


def check_combination(folder, steps, accumulation, bf16, checkpointing, clipping, *, every):
    settings = {
        **{"gradient_accumulation_steps": accumulation, "bf16": bf16, "max_steps": steps},
        **{"gradient_checkpointing": checkpointing, "max_grad_norm": 0.5 if clipping else 0.0},
    }
    witness = Witness()
    trainer = train(folder, adaptive(every=every), witness, **settings)
    assert len(witness.steps) == len(losses(trainer)) == steps
    for trained, gradients in witness.steps:
        assert trained == gradients
        assert 0 < len(trained) < len(list(trainer.model.parameters()))
    selected = [trained for trained, _ in witness.steps]
    assert [e["step"] for e in logged_sets(trainer)] == list(range(0, steps, every))
    assert all(former != latter for former, latter in itertools.pairwise(selected[::every]))
    replayed = train(folder, Replay(selected), **settings)
    torch.testing.assert_close(
        torch.tensor(losses(trainer)),
        torch.tensor(losses(replayed)),
        rtol=2e-2 if bf16 else 1e-4,
        atol=2e-2 if bf16 else 1e-4,
    )


COMBINATIONS = list(itertools.product([1, 4], [False, True], [False, True], [False, True]))


@pytest.mark.parametrize(("accumulation", "bf16", "checkpointing", "clipping"), COMBINATIONS[::5])
def test_what_is_trained_is_what_has_gradients_and_the_loss_is_that_of_eager_freezing(
    tmp_path, accumulation, bf16, checkpointing, clipping
):
    check_combination(tmp_path, 4, accumulation, bf16, checkpointing, clipping, every=2)


@pytest.mark.long
@pytest.mark.parametrize(("accumulation", "bf16", "checkpointing", "clipping"), COMBINATIONS)
def test_a_hundred_steps_train_what_has_gradients_under_every_combination(
    tmp_path, accumulation, bf16, checkpointing, clipping
):
    check_combination(tmp_path, 100, accumulation, bf16, checkpointing, clipping, every=25)


def test_frozen_parameters_do_not_move_and_trained_ones_do(tmp_path):
    before = weights(make_model())
    witness = Witness()
    trainer = train(tmp_path, adaptive(every="epoch"), witness, max_steps=3, weight_decay=0.1)
    (trained,) = {trained for trained, _ in witness.steps}
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trained


def test_an_epoch_selects_once_and_logs_through_the_trainer(tmp_path):
    callback = adaptive(0.5, every="epoch", compiled=False)
    trainer = train(tmp_path, callback, num_train_epochs=2, data=make_data(8))
    entries = [e for e in trainer.state.log_history if "adaptive/trained_parameters" in e]
    assert [e["step"] for e in entries] == [0, 4]
    for entry, selection in zip(entries, callback.adaptive.history, strict=True):
        assert entry["adaptive/trained_parameters"] == len(selection.trained)
        assert 0.3 < entry["adaptive/flops_fraction"] <= 0.5
        assert {key for key in entry if key.startswith("adaptive/importance")} == {"adaptive/importance"}
    spent = trainer.state.log_history[-2:]
    assert any(0.3 < e.get("adaptive/flops_fraction_spent", 0) <= 0.5 for e in spent)


def test_the_model_is_left_uncompiled_whole_and_able_to_generate(tmp_path):
    model = make_model()
    keys = list(model.state_dict())
    train(tmp_path, adaptive(), model=model, max_steps=2)
    assert not uses_compiled_code(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_weights(weights(again), weights(model))
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "saves"), [("epoch", (2,)), pytest.param(3, (2, 3, 4), marks=pytest.mark.long)]
)
def test_a_resumed_training_equals_the_uninterrupted_one_bit_for_bit(tmp_path, every, saves):
    """Step 3 selects anew: a checkpoint in between, right before one, and right after one."""
    settings = {"num_train_epochs": 2, "data": make_data(6), "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, adaptive(every=every), model=make_model(0.1), **settings)
    for saved_at in saves:
        resumed = train(
            tmp_path / "resumed",
            adaptive(every=every),
            model=make_model(0.1),
            resume=str(tmp_path / f"checkpoint-{saved_at}"),
            **settings | {"save_strategy": "no"},
        )
        assert_same_weights(weights(whole.model), weights(resumed.model))
        assert losses(whole) == losses(resumed)
        assert logged_sets(whole) == logged_sets(resumed)


def test_the_trainers_own_way_of_restoring_callbacks_works_too(tmp_path):
    settings = {"num_train_epochs": 2, "data": make_data(6), "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, adaptive(every=3, compiled=False), **settings)
    resumed = train(
        tmp_path,
        adaptive(every=3, compiled=False),
        resume=str(tmp_path / "checkpoint-2"),
        restore_callback_states_from_checkpoint=True,
        **settings,
    )
    assert_same_weights(weights(whole.model), weights(resumed.model))


def test_a_resume_with_another_budget_is_refused(tmp_path):
    train(tmp_path, adaptive(0.6, compiled=False), max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=r"trained with budget_fraction=0.6, this callback has 0.5"):
        train(tmp_path, adaptive(0.5), max_steps=4, resume=str(tmp_path / "checkpoint-2"))


def test_a_resume_with_the_state_of_another_model_is_refused(tmp_path):
    train(tmp_path, adaptive(compiled=False), max_steps=2, save_strategy="steps", save_steps=2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["AdaptiveBackpropCallback"]["attributes"]["progress"]
    saved["adaptive"]["parameters"]["lm_head.weight"] = [32, 99]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state of another model: lm_head\.weight"):
        train(tmp_path, adaptive(), max_steps=4, resume=str(tmp_path / "checkpoint-2"))


def test_batches_of_which_the_model_itself_computes_no_loss_are_refused(tmp_path):
    data = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in make_data(8)]
    with pytest.raises(ValueError, match="did not return a loss from the inputs"):
        train(tmp_path, adaptive(), data=data, max_steps=1)


def test_a_training_that_is_interrupted_leaves_the_model_whole_for_the_next(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, adaptive(), Interrupt(), model=model, max_steps=2)
    assert not uses_compiled_code(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert trained_parameters(model) == set(dict(model.named_parameters()))


def test_a_checkpoint_of_a_training_without_the_callback_is_gone_on_from(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(tmp_path, **settings)
    witness = Witness()
    train(tmp_path, adaptive(compiled=False), witness, resume=str(tmp_path / "checkpoint-1"), **settings)
    assert len(witness.steps) == 1


@pytest.mark.slow
def test_evaluation_during_training_and_grouping_by_length_work(tmp_path):
    witness = Witness()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "auto_find_batch_size": True}
    trainer = train(
        tmp_path, adaptive(), witness, max_steps=3, train_sampling_strategy="group_by_length", **settings
    )
    assert all(trained == gradients for trained, gradients in witness.steps)
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 3


def test_early_stopping_ends_a_training_like_any_end(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "max_steps": 8}
    settings |= {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    stopper = EarlyStoppingCallback(1, early_stopping_threshold=100.0)  # no step improves that much
    trainer = train(tmp_path, adaptive(), stopper, **settings)
    assert trainer.state.global_step == 2
    assert not uses_compiled_code(trainer.model)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_a_resume_with_another_torch_says_that_rounding_may_differ(tmp_path, caplog):
    train(tmp_path, adaptive(compiled=False), max_steps=4, save_strategy="steps", save_steps=2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.0.0"'))
    train(tmp_path, adaptive(compiled=False), max_steps=4, resume=str(path.parent))
    assert f"resumed with torch {torch.__version__}, saved with 2.0.0" in caplog.text


@pytest.mark.slow
def test_a_smaller_batch_size_found_automatically_starts_over(tmp_path):
    class Hungry(TrainerCallback):
        failed = False

        def on_step_end(self, args, state, control, **kwargs):
            if not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")

    witness = Witness()
    trainer = train(tmp_path, adaptive(), Hungry(), witness, max_steps=3, auto_find_batch_size=True)
    assert trainer.state.global_step == 3
    assert all(trained == gradients for trained, gradients in witness.steps)
    assert not uses_compiled_code(trainer.model)


def test_without_compilation_the_same_parameters_are_trained(tmp_path):
    one, other = adaptive(), adaptive(compiled=False)
    first = train(tmp_path, one, max_steps=4)
    second = train(tmp_path, other, max_steps=4)
    assert [s.trained for s in one.adaptive.history] == [s.trained for s in other.adaptive.history]
    torch.testing.assert_close(weights(first.model), weights(second.model))


@pytest.mark.parametrize("resume", [False, True])
def test_data_of_unknown_length_select_anew_at_every_pass(tmp_path, resume):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(make_data(8))

    settings = {"data": Stream(), "max_steps": 10, "save_strategy": "steps", "save_steps": 2}
    trainer = train(tmp_path, adaptive(every="epoch", compiled=False), **settings)
    if resume:  # in the middle of a pass, to whose end the former set is trained
        checkpoint = str(tmp_path / "checkpoint-2")
        callback = adaptive(every="epoch", compiled=False)
        trainer = train(tmp_path / "resumed", callback, resume=checkpoint, **settings)
    assert [entry["step"] for entry in logged_sets(trainer)] == [0, 4, 8]


def test_without_compilation_a_model_compiled_by_its_user_stays_compiled(tmp_path):
    model, witness = compile_blocks(make_model(), compiler="eager"), Witness()
    train(tmp_path, adaptive(compiled=False), witness, model=model, max_steps=4)
    assert all(trained == gradients for trained, gradients in witness.steps)
    assert uses_compiled_code(model)
    assert trained_parameters(model) == set(dict(model.named_parameters()))


def test_a_budget_below_the_minimum_names_the_smallest_and_leaves_the_model_whole(tmp_path):
    model = make_model()
    with pytest.raises(BudgetError):
        train(tmp_path, adaptive(0.2), model=model, max_steps=1)
    assert not uses_compiled_code(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_a_model_without_repeated_blocks_is_compiled_as_a_whole(tmp_path):
    witness, model = Witness(), make_model(layers=1)
    trainer = train(tmp_path, adaptive(0.7), witness, model=model, max_steps=3)
    assert all(trained == gradients for trained, gradients in witness.steps)
    replay = Replay([trained for trained, _ in witness.steps])
    assert losses(trainer) == losses(train(tmp_path, replay, model=make_model(layers=1), max_steps=3))
    assert not uses_compiled_code(model)


def test_a_trainer_without_training_data_is_refused(tmp_path):
    trainer = Trainer(model=make_model(), args=make_args(tmp_path), callbacks=[adaptive()])
    with pytest.raises(ValueError, match="requires a train_dataset"):
        trainer.train()


def test_importing_gtcompile_does_not_import_transformers():
    code = "import gtcompile, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_adapters_of_a_peft_model_are_selected_and_its_base_stays_frozen(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config)
    model.enable_input_require_grads()  # as SFTTrainer does, whose default is checkpointing
    model.enable_input_require_grads()
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = weights(model)
    witness, callback = Witness(), adaptive(0.9)
    train(tmp_path, callback, witness, model=model, max_steps=4, gradient_checkpointing=True)
    for trained, gradients in witness.steps:
        assert trained == gradients
        assert trained <= adapters
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == frozenset().union(*(trained for trained, _ in witness.steps))
    assert {n for n, parameter in model.named_parameters() if parameter.requires_grad} == adapters
    assert set(model.state_dict()) == before.keys()


def train_in_half_precision(folder, *callbacks):
    """Half precision, its scale too large for the first steps, which are skipped."""
    trainer = Trainer(
        model=make_model(),
        args=make_args(folder, fp16=True, max_steps=6, weight_decay=0.1, max_grad_norm=0.5),
        train_dataset=make_data(),
        callbacks=list(callbacks),
    )
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36, backoff_factor=2.0**-7)
    trainer.train()
    return trainer


def test_a_trainer_that_scales_gradients_skips_and_trains_as_with_eager_freezing(tmp_path):
    witness, before = Witness(), weights(make_model())
    trainer = train_in_half_precision(tmp_path, adaptive(), witness)
    sets = [trained for trained, _ in witness.steps]
    assert [gradients for _, gradients in witness.steps] == sets
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert trainer.accelerator.scaler.get_scale() < 2.0**36
    assert set() < moved <= frozenset().union(*sets)
    replayed = train_in_half_precision(tmp_path, Replay(sets))
    assert trainer.accelerator.scaler.get_scale() == replayed.accelerator.scaler.get_scale()
    torch.testing.assert_close(weights(trainer.model), weights(replayed.model), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_sequence_to_sequence_trainer_takes_the_callback(tmp_path):
    config = T5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=2, label_smoothing_factor=0.1,
        dataloader_pin_memory=False, predict_with_generate=True,
    )  # fmt: skip
    witness, model = Witness(), T5ForConditionalGeneration(config)
    collator = DataCollatorForSeq2Seq(byte_tokenizer(config), model=model)
    data = [{name: value.tolist() for name, value in row.items()} for row in make_data(8)]
    Seq2SeqTrainer(
        model=model, args=args, train_dataset=data, data_collator=collator, callbacks=[adaptive(0.7), witness]
    ).train()
    assert len(witness.steps) == 2
    assert all(trained == gradients for trained, gradients in witness.steps)


def test_trls_supervised_trainer_takes_the_callback(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        save_strategy="no", per_device_train_batch_size=2, dataloader_pin_memory=False, logging_steps=1,
        max_length=16,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in make_data(8)])
    witness, model = Witness(), make_model(vocabulary=300)
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=byte_tokenizer(model.config),
        callbacks=[adaptive(), witness],
    )  # fmt: skip
    trainer.train()
    assert len(witness.steps) == 2
    assert all(trained == gradients for trained, gradients in witness.steps)


def test_a_callback_that_joins_later_is_attached_and_needs_no_search(tmp_path, monkeypatch):
    monkeypatch.delattr(AdaptiveBackpropCallback, "_calling_trainer")
    witness = Witness()
    trainer = Trainer(
        model=make_model(), args=make_args(tmp_path, max_steps=2), train_dataset=make_data(),
        callbacks=[witness],
    )  # fmt: skip
    callback = adaptive(compiled=False).attach(trainer)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert len(witness.steps) == 2
    assert all(trained == gradients for trained, gradients in witness.steps)
    assert 0 < len(callback.adaptive.selection.trained) < len(list(trainer.model.parameters()))


def test_attaching_refuses_settings_that_would_undo_the_selection(tmp_path):
    args = make_args(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer = Trainer(model=make_model(), args=args, train_dataset=make_data())
    with pytest.raises(ValueError, match="torch_compile=True"):
        adaptive().attach(trainer)


def test_events_of_something_else_than_a_trainer_are_refused(tmp_path):
    with pytest.raises(GTCompileError, match=r"call attach\(trainer\)"):
        adaptive().on_init_end(make_args(tmp_path), None, None)


@pytest.mark.parametrize("policy", ["occasionally_full", "progressive"])
def test_a_policy_that_changes_the_set_by_the_step_stays_within_the_mean_budget(tmp_path, policy):
    witness, callback = Witness(), adaptive(0.6, policy=policy, every="epoch", compiled=False)
    trainer = train(tmp_path, callback, witness, gradient_accumulation_steps=2)
    assert len(witness.steps) == 6
    assert all(trained == gradients for trained, gradients in witness.steps)
    assert len({trained for trained, _ in witness.steps}) > 1
    logged = [entry.get("adaptive/flops_fraction_spent") for entry in trainer.state.log_history]
    assert 0 < [spent for spent in logged if spent is not None][-1] <= 0.6


def test_a_resume_in_the_middle_of_an_epoch_continues_the_policys_sets_bit_for_bit(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    how = {"policy": "sampled", "every": "epoch", "compiled": False}
    whole = train(tmp_path, adaptive(**how), **settings)
    resumed = train(
        tmp_path / "resumed",
        adaptive(**how),
        resume=str(tmp_path / "checkpoint-5"),
        **settings | {"save_strategy": "no"},
    )
    assert_same_weights(weights(whole.model), weights(resumed.model))
    assert losses(whole) == losses(resumed)
