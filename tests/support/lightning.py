"""A small LightningModule, data and callbacks for trainings by Lightning's Trainer."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from gtcompile import trained_parameters
from gtcompile.lightning import AdaptiveBackpropCallback
from tests.support.models import WIDTH, ResidualMLP
from tests.support.training import freeze_eagerly

QUIET = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*(does not have many workers|no `val_dataloader`|logging interval|step flavor)"
    ),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|exists and is not empty)"),
]
"""For tests in which Lightning warns about settings that a short test has."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(ResidualMLP() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Module(LightningModule):
    """A classifier that logs in every step."""

    def __init__(self, net=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net() if net is None else net

    def training_step(self, batch, batch_idx):
        x, labels = batch
        loss = nn.functional.cross_entropy(self.net(x), labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Witness(Callback):
    """Notes before each optimizer step what has a gradient and is to be trained; and each batch, its loss."""

    def __init__(self):
        self.steps, self.losses, self.batches = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.steps.append((trained_parameters(pl_module), gradients))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.batches.append(batch)


class Recording(Logger):
    """Keeps what is logged."""

    name, version = "recording", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({**metrics, "step": step})

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Replay(Callback):
    """Freezes by `requires_grad_` what another run had frozen at each step."""

    def __init__(self, sets):
        self.sets = sets

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            freeze_eagerly(pl_module, self.sets[trainer.global_step])


def make_data(count=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, WIDTH, generator=generator)
    return [(row, torch.tensor(number % 4)) for number, row in enumerate(x)]


def make_loader(count=24, size=2, **changes):
    return DataLoader(make_data(count), batch_size=size, **changes)


def adaptive(budget=0.6, **changes):
    return AdaptiveBackpropCallback(budget, **({"compiler": "eager", "batches": 2, "every": 2} | changes))


def make_trainer(folder, *callbacks, **changes):
    settings = {
        **{"default_root_dir": folder, "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False},
    }
    return Trainer(callbacks=list(callbacks), **(settings | changes))


def fit(folder, *callbacks, module=None, loader=None, validation=None, resume=None, **changes):
    """Train; returns the module and the trainer."""
    module = Module() if module is None else module
    trainer = make_trainer(folder, *callbacks, **changes)
    loader = make_loader() if loader is None else loader
    trainer.fit(module, loader, validation, ckpt_path=resume)
    return module, trainer
