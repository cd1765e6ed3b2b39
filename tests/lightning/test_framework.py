"""Which of Lightning's packages is used, and what is said if there is none."""

import importlib.util
import subprocess
import sys

import pytest

from gtcompile.lightning.framework import find_framework

OTHER_PACKAGE = """
import warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl, torch
from torch.utils.data import DataLoader
from gtcompile.lightning import AdaptiveBackpropCallback

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

callback = AdaptiveBackpropCallback(0.7, compiler="eager", batches=2)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], **quiet)
trainer.fit(Module(), DataLoader(torch.randn(8, 4), batch_size=2))
assert isinstance(callback, pl.Callback)
print(len(callback.adaptive.history), "lightning.pytorch" in __import__("sys").modules)
"""


def without(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    without(monkeypatch, "lightning", "pytorch_lightning")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning>=2.4'"):
        find_framework()


@pytest.mark.slow
def test_a_program_that_imports_pytorch_lightning_gets_a_callback_for_it():
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    done = subprocess.run([sys.executable, "-c", OTHER_PACKAGE], capture_output=True, text=True, check=False)
    assert done.stdout == "1 False\n", done.stderr
