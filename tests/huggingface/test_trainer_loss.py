"""The trainer's own loss: importance is measured through it, and measuring changes nothing."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, default_data_collator

from gtcompile import PrefixCache, add_labelled_positions, backward_costs, only_labelled_logits
from gtcompile.graph.flops import count_flops
from gtcompile.huggingface.trainer_loss import TrainerLoss
from gtcompile.training import step_costs
from tests.support.known_costs import capture_costs_once
from tests.support.trainer import adaptive, losses, make_args, make_data, make_model, train


@pytest.fixture(autouse=True)
def costs_captured_once(monkeypatch):
    capture_costs_once(monkeypatch, step_costs)


def test_importance_is_measured_through_the_trainers_own_loss(tmp_path):
    seen = []

    def doubled(outputs, labels, num_items_in_batch=None):
        seen.append(num_items_in_batch)
        return 2 * torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    plain, twice = (adaptive(every=9, compiled=False) for _ in range(2))
    train(tmp_path, plain, max_steps=1, label_smoothing_factor=0.1, optim="sgd")
    train(tmp_path, twice, max_steps=1, trainer_settings={"compute_loss_func": doubled}, optim="sgd")
    assert len(seen) == 3  # two batches measured, one trained
    assert plain.adaptive.importance != twice.adaptive.importance


def test_what_a_loss_counts_and_records_on_its_trainer_is_put_back_after_measuring(tmp_path):
    class Counting(Trainer):
        seen = 0

        def compute_loss(self, model, inputs, **kwargs):
            self.seen += 1
            self.records["train"].append(self.seen)
            return super().compute_loss(model, inputs, **kwargs)

    trainer = Counting(model=make_model(), args=make_args(tmp_path), train_dataset=make_data(4))
    trainer.records = {"train": [1.0]}
    loss = TrainerLoss(trainer)
    assert loss(trainer.model, trainer.data_collator(make_data(2))).isfinite()
    assert (trainer.seen, trainer.records) == (0, {"train": [1.0]})


@pytest.mark.parametrize("how", ["log", "append"])
def test_what_a_loss_logs_while_it_is_measured_reaches_neither_history_nor_loggers(tmp_path, how):
    told = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            told.append(logs)

    class Logging(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            entry = {"seen": 1.0}
            self.log(entry) if how == "log" else self.state.log_history.append(entry)
            return super().compute_loss(model, inputs, **kwargs)

    settings = {"args": make_args(tmp_path), "train_dataset": make_data(4), "callbacks": [Logger()]}
    trainer = Logging(model=make_model(), **settings)
    TrainerLoss(trainer)(trainer.model, trainer.data_collator(make_data(2)))
    assert (told, trainer.state.log_history) == ([], [])
    trainer.log({"afterwards": 1.0})
    assert len(told) == len(trainer.state.log_history) == 1


def test_both_exact_savings_train_the_same_losses_under_the_callback(tmp_path):
    def run(model, prepare):
        collate = {"data_collator": lambda rows: prepare(default_data_collator(rows))}
        callback = adaptive(policy="last_layers", every=100)
        settings = {"trainer_settings": collate, "num_train_epochs": 5}
        return losses(train(tmp_path, callback, model=model, data=make_data(6), **settings))

    plain, saving = make_model(), make_model()
    cache = PrefixCache(saving)
    only_labelled_logits(saving)
    assert run(saving, add_labelled_positions) == pytest.approx(run(plain, dict), rel=1e-4)
    assert cache.stats.hits > 5
    assert cache.stats.depth > 0


def test_costs_are_those_of_everything_that_the_loss_does(tmp_path):
    class Distilling(Trainer):
        """Adds the distance from a teacher, which runs inside the loss."""

        teacher = make_model()

        def compute_loss(self, model, inputs, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            with torch.no_grad():
                wanted = self.teacher(**inputs).logits
            self.log_of_logits = wanted.max().item()
            return loss + (outputs.logits - wanted).square().mean()

    trainer = Distilling(model=make_model(), args=make_args(tmp_path), train_dataset=make_data(4))
    batch = trainer.data_collator(make_data(2))
    costs = backward_costs(trainer.model, batch, loss_fn=TrainerLoss(trainer))
    with count_flops() as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    assert costs.full_flops == counter.get_total_flops()
    plain = backward_costs(trainer.model, batch)
    assert costs.full_flops == plain.full_flops + plain.forward_flops
