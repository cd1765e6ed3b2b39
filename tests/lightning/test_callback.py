"""The callback in Lightning's Trainer: what is trained, logged, saved, left behind and refused."""

import contextlib
import os
from unittest import mock

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, strategies
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import gtcompile.lightning
from gtcompile import BudgetError, CaptureError, GTCompileError, compile_blocks
from gtcompile.capture.pristine_model import uses_compiled_code
from gtcompile.graph.flops import count_flops
from gtcompile.lightning.compatibility import check_trainer
from tests.support.launching import run_on_ranks
from tests.support.lightning import (
    QUIET,
    Module,
    Net,
    Recording,
    Replay,
    Witness,
    adaptive,
    fit,
    make_data,
    make_loader,
    make_trainer,
)
from tests.support.models import WIDTH
from tests.support.trainer import assert_same_weights, weights

pytestmark = QUIET


def assert_equal_steps(ours, theirs):
    assert ours.losses == theirs.losses
    for (trained, gradients), (_, expected) in zip(ours.steps, theirs.steps, strict=True):
        assert trained == gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], expected[name]) for name in gradients)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 5, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"max_epochs": 2, "limit_train_batches": 3},
    ],
)
def test_losses_and_gradients_are_those_of_the_training_frozen_by_requires_grad(tmp_path, settings):
    ours, theirs = Witness(), Witness()
    module, _ = fit(tmp_path, adaptive(), ours, **settings)
    sets = [trained for trained, _ in ours.steps]
    assert len(set(sets)) > 1
    assert all(0 < len(trained) < 16 for trained in sets)
    replayed, _ = fit(tmp_path, Replay(sets), theirs, **settings)
    assert_equal_steps(ours, theirs)
    assert_same_weights(weights(module), weights(replayed))


class Meter(Callback):
    """Counts the FLOPs of every batch; stands behind the callback, whose measuring is not counted."""

    def __init__(self):
        self.flops = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.stack = contextlib.ExitStack()
        self.counter = self.stack.enter_context(count_flops())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.stack.close()
        self.flops.append(self.counter.get_total_flops())


class Planned(Callback):
    """Notes what the callback before it says that each step costs."""

    def __init__(self, callback):
        self.callback, self.flops = callback, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.flops.append(self.callback.adaptive.step_flops)


def test_counted_flops_are_the_planned_ones_and_those_of_eager_freezing(tmp_path):
    callback, meter, witness, expected = adaptive(), Meter(), Witness(), Meter()
    planned = Planned(callback)
    fit(tmp_path, callback, planned, meter, witness, limit_train_batches=6)
    fit(tmp_path, Replay([trained for trained, _ in witness.steps]), expected, limit_train_batches=6)
    assert meter.flops == expected.flops == planned.flops
    assert len(set(meter.flops)) > 1


def test_an_epoch_selects_once_and_the_loggers_receive_it(tmp_path):
    logger, callback = Recording(), adaptive(0.5, every="epoch")
    fit(tmp_path, callback, logger=logger, max_epochs=2)
    rows = [row for row in logger.rows if "adaptive/flops_fraction" in row]
    assert [row["step"] for row in rows] == [0, 12]
    for row, selection in zip(rows, callback.adaptive.history, strict=True):
        assert row["adaptive/trained_parameters"] == len(selection.trained)
        assert 0.3 < row["adaptive/flops_fraction"] <= 0.5
    assert 0.3 < logger.rows[-1]["adaptive/flops_fraction_spent"] <= 0.5


class Counting(Module):
    """Counts batches in a metric, in a list and in a tensor, draws random numbers, and logs in every way."""

    def __init__(self):
        super().__init__(nn.Sequential(Net(), nn.Dropout(0.1)))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(4)
        self.register_buffer("calls", torch.zeros(()))
        self.losses = []

    def training_step(self, batch):
        x, labels = batch
        output = self.net(x)
        loss = nn.functional.cross_entropy(output, labels)
        self.calls += 1
        self.losses.append(loss.detach())
        self.accuracy(output, labels)
        self.log_dict({"loss": loss, "accuracy": self.accuracy}, on_step=True, on_epoch=True)
        self.logger.log_metrics({"by hand": loss.item()}, step=self.global_step)
        return {"loss": loss, "other": output}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class RandomStates(Callback):
    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append(torch.get_rng_state())


def counted(folder, *callbacks):
    torch.manual_seed(7)
    logger, states = Recording(), RandomStates()
    settings = {"logger": logger, "log_every_n_steps": 1, "val_check_interval": 4}
    module, trainer = fit(
        folder, *callbacks, states, module=Counting(), validation=make_loader(4), **settings
    )
    rows = [row for row in logger.rows if not any("adaptive" in name for name in row)]
    return module, rows, states.states, trainer.callback_metrics


def test_as_many_batches_are_measured_as_were_asked_for(tmp_path, caplog):
    taken = []

    class Counting(Module):
        def training_step(self, batch, batch_idx):
            taken.append(batch)
            return super().training_step(batch, batch_idx)

    fit(
        tmp_path, adaptive(batches=17, compiled=False), module=Counting(), loader=make_loader(40), max_steps=1
    )
    assert len(taken) >= 17
    assert "selecting on the first" not in caplog.text


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_measuring_neither_logs_nor_counts_nor_draws(tmp_path):
    """Everything trained at every step: what is left of the callback is its measuring."""
    witness = Witness()
    ours = counted(tmp_path, adaptive(1.0, every=3, always=["*"], compiled=False), witness)
    assert len(witness.steps) == 12
    theirs = counted(tmp_path)
    assert ours[0].calls == len(ours[0].losses) == 12
    assert ours[0].losses == theirs[0].losses
    assert ours[1] == theirs[1]
    assert sum("by hand" in row for row in ours[1]) == sum("accuracy_step" in row for row in ours[1]) == 12
    assert all(torch.equal(one, other) for one, other in zip(ours[2], theirs[2], strict=True))
    assert ours[3] == theirs[3]
    assert_same_weights(weights(ours[0]), weights(theirs[0]))


def is_as_before(module):
    return not uses_compiled_code(module) and all(p.requires_grad for p in module.parameters())


def test_the_module_is_left_uncompiled_and_whole_and_trains_again(tmp_path):
    module, callback = Module(), adaptive()
    keys = list(module.state_dict())
    fit(tmp_path, callback, module=module, limit_train_batches=2)
    assert is_as_before(module)
    assert list(module.state_dict()) == keys
    first = callback.adaptive
    fit(tmp_path, callback, module=module, limit_train_batches=2)
    assert callback.adaptive is not first
    assert is_as_before(module)


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_is_interrupted_leaves_the_module_whole_for_the_next(tmp_path, error):
    class Failing(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert uses_compiled_code(pl_module)
            raise error

    module, callback = Module(), adaptive()
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(tmp_path, callback, Failing(), module=module)
    assert is_as_before(module)
    witness = Witness()
    fit(tmp_path, callback, witness, module=module, limit_train_batches=2)
    assert all(trained == gradients.keys() for trained, gradients in witness.steps)


class Resumable(DataLoader):
    """Shuffles by epoch, and continues in the middle of one, as Lightning asks of loaders."""

    taken = epoch = start = 0

    def __iter__(self):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        start, self.start = self.start, 0
        for self.taken in range(start + 1, 7):
            rows = order[2 * self.taken - 2 : 2 * self.taken]
            yield self.collate_fn([self.dataset[row] for row in rows])
        self.epoch += 1

    def state_dict(self):
        return {"taken": self.taken, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.start, self.epoch = state["taken"] % 6, state["epoch"]


def resumable():
    return Resumable(make_data(12), batch_size=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("every", ["epoch", pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize("save_at", [4, 5, 6])
@pytest.mark.parametrize("policy", ["best", pytest.param("rotating", marks=pytest.mark.long)])
def test_a_resumed_training_equals_the_uninterrupted_one_bit_for_bit(tmp_path, every, save_at, policy):
    """In the middle of an epoch, right before a selection, and at the end of an epoch."""
    settings = {"every": every, "policy": policy, "frozen_state": "cpu"}
    saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    callback, witness = adaptive(0.7, **settings), Witness()
    whole, _ = fit(
        tmp_path, callback, witness, saver, loader=resumable(), max_epochs=2, enable_checkpointing=True
    )
    again, later = adaptive(0.7, **settings), Witness()
    path = tmp_path / "saved" / f"step={save_at}.ckpt"
    module, trainer = fit(tmp_path, again, later, loader=resumable(), max_epochs=2, resume=path)
    assert trainer.global_step == 12
    assert later.losses == witness.losses[save_at:]
    assert [trained for trained, _ in later.steps] == [trained for trained, _ in witness.steps[save_at:]]
    assert again.adaptive.history == callback.adaptive.history
    assert_same_weights(weights(module), weights(whole))


def test_a_checkpoint_written_after_the_training_continues_it_too(tmp_path):
    settings = {"loader": resumable(), "max_epochs": 2}
    whole, _ = fit(tmp_path, adaptive(every=8), **settings)
    _, trainer = fit(tmp_path, adaptive(every=8), loader=resumable())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    module, _ = fit(tmp_path, adaptive(every=8), resume=tmp_path / "end.ckpt", **settings)
    assert_same_weights(weights(module), weights(whole))


def test_a_checkpoint_is_read_without_unpickling_and_refused_with_other_options(tmp_path):
    _, trainer = fit(tmp_path, adaptive(), limit_train_batches=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    more = {"max_epochs": 2, "resume": tmp_path / "x.ckpt"}
    with pytest.raises(ValueError, match=r"trained with budget_fraction=0.6, this callback has 0.7"):
        fit(tmp_path, adaptive(0.7), **more)
    with pytest.raises(ValueError, match="trained with seed=0, this callback has 3"):
        fit(tmp_path, adaptive(seed=3), **more)


def test_a_checkpoint_of_a_training_without_the_callback_is_continued(tmp_path):
    _, trainer = fit(tmp_path, limit_train_batches=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    callback = adaptive(every="epoch")
    fit(tmp_path, callback, max_epochs=2, limit_train_batches=2, resume=tmp_path / "x.ckpt")
    assert len(callback.adaptive.history) == 1


def test_modules_without_repeated_blocks_are_compiled_as_a_whole(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(WIDTH, WIDTH)
            self.scale = nn.Parameter(torch.ones(WIDTH))
            self.heads = nn.ModuleList(
                [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))]
            )

        def training_step(self, batch, batch_idx):
            x, labels = batch
            return nn.functional.cross_entropy(self.heads[0](self.net(x) * self.scale), labels)

    class Compiled(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert uses_compiled_code(pl_module.net)

    ours, theirs = Witness(), Witness()
    fit(tmp_path, adaptive(0.8), ours, Compiled(), module=Two(), limit_train_batches=6)
    fit(tmp_path, Replay([s for s, _ in ours.steps]), theirs, module=Two(), limit_train_batches=6)
    assert_equal_steps(ours, theirs)


def manual():
    module = Module()
    module.automatic_optimization = False
    return module


class Iterating(Module):
    def training_step(self, dataloader_iter):
        raise AssertionError("refused before any step")


@pytest.mark.parametrize(
    ("make", "callbacks", "settings", "message"),
    [
        (manual, (), {}, "cannot measure its loss without training; leave AdaptiveBackpropCallback out"),
        (Iterating, (), {}, "fetches batches itself"),
        (Module, (BackboneFinetuning(),), {}, "BackboneFinetuning freezes parameters as well"),
        (lambda: Module(compile_blocks(Net(), compiler="eager")), (), {}, "compiled already"),
        (lambda: torch.compile(Module(), backend="eager"), (), {}, "compiled already"),
        (lambda: Module(torch.compile(Net(), backend="eager")), (), {}, "compiled already"),
    ],
)
def test_what_would_undo_the_selection_is_refused_before_any_work(
    tmp_path, make, callbacks, settings, message
):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, adaptive(), *callbacks, module=make(), **settings)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("FSDPStrategy", "version 1 of FSDP"),
        ("ModelParallelStrategy", "was never run with ModelParallelStrategy"),
    ],
)
def test_strategies_that_do_not_work_are_refused(tmp_path, strategy, message):
    trainer = make_trainer(tmp_path)
    trainer._accelerator_connector.strategy = object.__new__(getattr(strategies, strategy))  # needs GPUs
    with pytest.raises(ValueError, match=message):
        check_trainer(trainer, Module(), gtcompile.lightning.AdaptiveBackpropCallback, compiled=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget_fraction": 2}, ValueError, "expected"),
        ({"every": 0}, ValueError, "expected every="),
        ({"policy": "sample"}, ValueError, "near names: sampled"),
        ({"seed": "0"}, TypeError, "expected seed to be a whole number"),
    ],
)
def test_wrong_arguments_are_refused_by_the_constructor(arguments, error, message):
    with pytest.raises(error, match=message):
        gtcompile.lightning.AdaptiveBackpropCallback(**arguments)


def test_a_budget_below_the_minimum_names_the_smallest_and_leaves_the_module_whole(tmp_path):
    module = Module()
    with pytest.raises(BudgetError, match=r"takes at least 0\.34"):
        fit(tmp_path, adaptive(0.01), module=module)
    assert is_as_before(module)


class Losing(Module):
    """Returns no loss."""

    def training_step(self, batch, batch_idx):
        return {"loss": None}


class Wrong(Module):
    def training_step(self, batch, batch_idx):
        return self.net(batch["x"]).sum()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (Losing, CaptureError, "expected training_step to return the loss, .* got NoneType"),
        (Wrong, TypeError, "list indices must be integers"),
    ],
)
def test_a_training_step_that_fails_says_so_in_its_own_words(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        fit(tmp_path, adaptive(), module=make())


def test_nothing_is_selected_before_training():
    with pytest.raises(GTCompileError, match=r"call trainer.fit\(...\) first"):
        _ = adaptive().adaptive


def test_replicas_that_wait_for_every_gradient_are_refused(tmp_path):
    with mock.patch.dict(os.environ):  # Lightning leaves variables, in which Accelerate would find ranks
        try:
            with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
                fit(tmp_path, adaptive(), strategy="ddp")
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.long
def test_two_ranks_train_what_one_process_trains(tmp_path):
    run_on_ranks("lightning_run", tmp_path)
    outcome = torch.load(tmp_path / "outcome", weights_only=False)
    loader = DataLoader(outcome["batches"], batch_size=None)
    module, _ = fit(tmp_path, Replay(outcome["sets"]), loader=loader, accumulate_grad_batches=2)
    torch.testing.assert_close(weights(module), dict(outcome["weights"]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_validation_between_the_steps_changes_nothing(tmp_path):
    ours, theirs = Witness(), Witness()
    fit(tmp_path, adaptive(), ours, validation=make_loader(4), val_check_interval=3)
    fit(tmp_path, adaptive(), theirs)
    assert_equal_steps(ours, theirs)


@pytest.mark.parametrize("policy", ["sampled", "progressive"])
def test_a_policy_that_changes_the_set_by_the_step_stays_within_the_mean_budget(tmp_path, policy):
    callback, witness, meter = adaptive(0.6, policy=policy, every="epoch"), Witness(), Meter()
    fit(tmp_path, callback, meter, witness)
    assert len({trained for trained, _ in witness.steps}) > 1
    full = callback.adaptive.step_flops / callback.adaptive.step_fraction
    assert sum(meter.flops) / len(meter.flops) <= 0.6 * full
