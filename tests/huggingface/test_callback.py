"""The callback in Hugging Face's Trainer: what is trained, what is logged, what is refused."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import gtcompile
from gtcompile import AdaptiveBackpropCallback, BudgetError, CaptureError, train_only, trained_parameters
from gtcompile.capture.pristine_model import uses_compiled_code
from gtcompile.tools.models.byte_tokenizer import byte_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def make_model(dropout=0.0, vocabulary=32, layers=3):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def make_data(count=24, length=8):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 32, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def make_args(folder, **changes):
    settings = {
        **{"output_dir": str(folder), "per_device_train_batch_size": 2, "num_train_epochs": 1},
        **{"learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True},
        **{"save_strategy": "no", "logging_steps": 1, "dataloader_pin_memory": False},
        **{"lr_scheduler_type": "constant"},
    }
    return TrainingArguments(**(settings | changes))


class Witness(TrainerCallback):
    """Notes, before each optimizer step, which parameters have a gradient and which are to be trained."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        gradients = frozenset(n for n, p in model.named_parameters() if p.grad is not None)
        self.steps.append((trained_parameters(model), gradients))


class Replay(TrainerCallback):
    """Freezes by `requires_grad_` alone what another run had frozen at each step."""

    def __init__(self, sets):
        self.sets = sets

    def on_step_begin(self, args, state, control, **kwargs):
        train_only(kwargs["model"], self.sets[state.global_step])

    def on_train_end(self, args, state, control, **kwargs):
        train_only(kwargs["model"], None)


def adaptive(budget=0.6, **changes):
    return AdaptiveBackpropCallback(budget, **({"compiler": "eager", "batches": 2, "every": 2} | changes))


def train(folder, *callbacks, model=None, data=None, resume=None, trainer_settings=None, **changes):
    model = make_model() if model is None else model
    data = make_data() if data is None else data
    trainer = Trainer(
        model=model,
        args=make_args(folder, **changes),
        train_dataset=data,
        callbacks=list(callbacks),
        **({"eval_dataset": make_data()[:4]} | (trainer_settings or {})),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged_sets(trainer):
    return [entry for entry in trainer.state.log_history if "adaptive/flops_fraction" in entry]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


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
    callback = adaptive(0.5, every="epoch")
    trainer = train(tmp_path, callback, num_train_epochs=2, data=make_data(8))
    entries = [e for e in trainer.state.log_history if "adaptive/trained_parameters" in e]
    assert [e["step"] for e in entries] == [0, 4]
    for entry, selection in zip(entries, callback.adaptive.history, strict=True):
        assert entry["adaptive/trained_parameters"] == len(selection.trained)
        assert 0.3 < entry["adaptive/flops_fraction"] <= 0.5
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


@pytest.mark.parametrize("every", ["epoch", 3])
def test_a_resumed_training_equals_the_uninterrupted_one_bit_for_bit(tmp_path, every):
    """Steps 3 and 6 select anew: a checkpoint in between, right before one, and right after one."""
    settings = {"num_train_epochs": 2, "data": make_data(6), "save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path, adaptive(every=every), model=make_model(0.1), **settings)
    for saved_at in (2, 3, 4):
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
    whole = train(tmp_path, adaptive(every=3), **settings)
    resumed = train(
        tmp_path,
        adaptive(every=3),
        resume=str(tmp_path / "checkpoint-2"),
        restore_callback_states_from_checkpoint=True,
        **settings,
    )
    assert_same_weights(weights(whole.model), weights(resumed.model))


def test_a_resume_with_another_budget_is_refused(tmp_path):
    train(tmp_path, adaptive(0.6), max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=r"trained with budget_fraction=0.6, this callback has 0.5"):
        train(tmp_path, adaptive(0.5), max_steps=4, resume=str(tmp_path / "checkpoint-2"))


def test_a_resume_with_the_state_of_another_model_is_refused(tmp_path):
    train(tmp_path, adaptive(), max_steps=2, save_strategy="steps", save_steps=2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["AdaptiveBackpropCallback"]["attributes"]["progress"]
    saved["adaptive"]["parameters"]["lm_head.weight"] = [32, 99]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state of another model: lm_head\.weight"):
        train(tmp_path, adaptive(), max_steps=4, resume=str(tmp_path / "checkpoint-2"))


def test_importance_is_measured_through_the_trainers_own_loss(tmp_path):
    seen = []

    def doubled(outputs, labels, num_items_in_batch=None):
        seen.append(num_items_in_batch)
        return 2 * torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    plain, twice = adaptive(every=9), adaptive(every=9)
    train(tmp_path, plain, max_steps=1, label_smoothing_factor=0.1, optim="sgd")
    train(tmp_path, twice, max_steps=1, trainer_settings={"compute_loss_func": doubled}, optim="sgd")
    assert len(seen) == 3  # two batches measured, one trained
    assert plain.adaptive.importance != twice.adaptive.importance


def test_batches_of_which_the_model_itself_computes_no_loss_are_refused(tmp_path):
    data = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in make_data(8)]
    with pytest.raises(
        CaptureError, match=r"own loss on this trainer.s batches: expected the model to return"
    ):
        train(tmp_path, adaptive(), data=data, max_steps=1)


def test_what_a_loss_counts_and_records_on_its_trainer_is_put_back_after_measuring(tmp_path):
    class Counting(Trainer):
        seen = 0

        def compute_loss(self, model, inputs, **kwargs):
            self.seen += 1
            self.records["train"].append(self.seen)
            return super().compute_loss(model, inputs, **kwargs)

    trainer = Counting(model=make_model(), args=make_args(tmp_path), train_dataset=make_data(4))
    trainer.records = {"train": [1.0]}
    own = gtcompile.huggingface.trainer_loss.TrainerLoss(trainer.model, trainer)
    assert own(**trainer.data_collator(make_data(2))).isfinite()
    assert (trainer.seen, trainer.records) == (0, {"train": [1.0]})


def test_data_that_measuring_would_use_up_are_refused(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        rows = iter(make_data())

        def __iter__(self):
            return self.rows

    with pytest.raises(ValueError, match=r"Once\.__iter__ returns the same iterator"):
        train(tmp_path, adaptive(), data=Once(), max_steps=1)


def test_batches_that_are_no_dictionary_are_refused(tmp_path):
    with pytest.raises(TypeError, match="a dictionary of the model.s arguments, got a list"):
        train(tmp_path, adaptive(), max_steps=1, trainer_settings={"data_collator": list})


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
    train(tmp_path, adaptive(), witness, resume=str(tmp_path / "checkpoint-1"), **settings)
    assert len(witness.steps) == 1


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
    train(tmp_path, adaptive(), max_steps=4, save_strategy="steps", save_steps=2)
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.0.0"'))
    train(tmp_path, adaptive(), max_steps=4, resume=str(path.parent))
    assert f"resumed with torch {torch.__version__}, saved with 2.0.0" in caplog.text


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
    trainer = train(tmp_path, adaptive(every="epoch"), **settings)
    if resume:  # in the middle of a pass, to whose end the former set is trained
        checkpoint = str(tmp_path / "checkpoint-2")
        trainer = train(tmp_path / "resumed", adaptive(every="epoch"), resume=checkpoint, **settings)
    assert [entry["step"] for entry in logged_sets(trainer)] == [0, 4, 8]


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


def test_without_compilation_a_model_compiled_by_its_user_stays_compiled(tmp_path):
    model, witness = compiled_in_blocks(make_model()), Witness()
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


def test_a_model_without_repeated_blocks_is_compiled_as_a_whole(tmp_path):
    witness, model = Witness(), make_model(layers=1)
    trainer = train(tmp_path, adaptive(0.7), witness, model=model, max_steps=3)
    assert all(trained == gradients for trained, gradients in witness.steps)
    replay = Replay([trained for trained, _ in witness.steps])
    assert losses(trainer) == losses(train(tmp_path, replay, model=make_model(layers=1), max_steps=3))
    assert not uses_compiled_code(model)


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
        gtcompile.huggingface.compatibility.check_trainer(trainer, AdaptiveBackpropCallback)


def test_a_trainer_without_training_data_is_refused(tmp_path):
    trainer = Trainer(model=make_model(), args=make_args(tmp_path), callbacks=[adaptive()])
    with pytest.raises(ValueError, match="requires a train_dataset"):
        trainer.train()


def test_too_few_examples_to_measure_on_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2 training examples to measure importance on, got 1"):
        train(tmp_path, adaptive(), data=make_data(1), max_steps=1)


def test_hooks_that_make_inputs_require_gradients_are_taken_away(tmp_path):
    model = make_model()
    model.enable_input_require_grads()
    model.enable_input_require_grads()  # PEFT and TRL both do; the first handle is lost
    train(tmp_path, adaptive(), model=model, max_steps=1)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    "arguments",
    [
        *({"budget_fraction": 0}, {"budget_fraction": 50}, {"every": 0}, {"every": True}, {"every": "week"}),
        *({"batches": 1}, {"batches": 2.5}, {"batches": "4"}),
    ],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        AdaptiveBackpropCallback(**arguments)


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


def test_a_peft_model_works_in_a_plain_loop():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config)
    model.enable_input_require_grads()
    gtcompile.compile_blocks(model, compiler="eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    own = gtcompile.AdaptiveBackprop(model, optimizer, 0.9)
    rows = torch.stack([row["input_ids"] for row in make_data(8)])
    batches = [
        {"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in rows.split(2)
    ]
    selection = own.reselect(batches[:2])
    model(**batches[2]).loss.backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == selection.trained
    assert all("lora_" in name for name in gradients)
    gtcompile.uncompile_blocks(model)


def accelerated_loop(folder, compile_when, resume=False):
    """Eight steps that select anew at 0 and 4; saved once, right after the second selection."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader = torch.utils.data.DataLoader(make_data(16), batch_size=2)
    if compile_when == "before":
        gtcompile.compile_blocks(model, compiler="eager")
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if compile_when == "after":
        gtcompile.compile_blocks(model, compiler="eager")
    own = gtcompile.AdaptiveBackprop(model, optimizer, 0.6)
    accelerator.register_for_checkpointing(own)
    batches = list(loader)
    if resume:
        accelerator.load_state(folder / "state")
    for number, batch in list(enumerate(batches))[4 if resume else 0 :]:
        if number in (0, 4) and not resume:
            own.reselect(batches[:2])
        if number == 4 and not resume:
            accelerator.save_state(folder / "state")
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            gradients = {n for n, p in model.named_parameters() if p.grad is not None}
            assert gradients == own.selection.trained
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model), accelerator.get_state_dict(model)


@pytest.mark.parametrize("compile_when", ["before", "after"])
def test_a_plain_loop_with_accelerate_trains_saves_and_goes_on(tmp_path, compile_when):
    model, saved = accelerated_loop(tmp_path, compile_when)
    assert list(saved) == list(make_model().state_dict())
    model.save_pretrained(tmp_path / "model", state_dict=saved)
    assert_same_weights(weights(LlamaForCausalLM.from_pretrained(tmp_path / "model")), weights(model))
    again, _ = accelerated_loop(tmp_path, compile_when, resume=True)
    assert_same_weights(weights(again), weights(model))


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


def plain_loop(folder, setting, save_after=None, resume=False):
    """Eight steps of a loop of one's own that selects at 0, 3 and 6, saved once and continued from there."""
    model = make_model(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gtcompile.compile_blocks(model, compiler="eager")
    own = gtcompile.AdaptiveBackprop(model, optimizer, 0.6, frozen_state=setting)
    rows = torch.stack([row["input_ids"] for row in make_data(20)])
    batches = [{"input_ids": part, "labels": part} for part in rows.split(2)]
    start = 0
    if resume:
        saved = torch.load(folder / "state")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        own.load_state_dict(saved["adaptive"])
        torch.set_rng_state(saved["random"])
        start = saved["step"]
    for step in range(start, 8):
        if step % 3 == 0:
            own.reselect(batches[8:])
        model(**batches[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == save_after:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(
                {**state, "adaptive": own.state_dict(), "random": torch.get_rng_state()}, folder / "state"
            )
    gtcompile.uncompile_blocks(model)
    return weights(model), own.history


@pytest.mark.parametrize(("setting", "save_after"), [("keep", 2), ("cpu", 3), ("drop", 3), ("drop", 4)])
def test_a_plain_loop_resumes_bit_for_bit(tmp_path, setting, save_after):
    """In the middle of a stretch, right before a selection and right after one."""
    whole, history = plain_loop(tmp_path, setting, save_after=save_after)
    resumed, continued = plain_loop(tmp_path, setting, resume=True)
    assert continued == history
    assert_same_weights(whole, resumed)
