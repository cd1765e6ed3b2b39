"""PyTorch Lightning under the name that is installed: `lightning.pytorch` or `pytorch_lightning`.

The two packages have separate classes, and a Trainer of one does not take modules of the other. So the one
that the program has imported already comes first.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

NAMES = ("lightning.pytorch", "pytorch_lightning")


def find_framework() -> Any:
    """Import Lightning.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return importlib.import_module(name)
    raise ModuleNotFoundError(
        "gtcompile.lightning needs PyTorch Lightning, which is not installed: pip install 'lightning>=2.4'",
        name="lightning",
    )


framework = find_framework()

if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
else:
    Callback = framework.Callback
    LightningModule = framework.LightningModule
    Trainer = framework.Trainer
