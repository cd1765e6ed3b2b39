"""Adaptive backpropagation in the Trainer of PyTorch Lightning.

Importing this package imports nothing of Lightning. The callback does, when it is first used.
"""

from typing import TYPE_CHECKING

from gtcompile.lazy_names import lazy_names

if TYPE_CHECKING:
    from gtcompile.lightning.callback import AdaptiveBackpropCallback as AdaptiveBackpropCallback

_NAMES = {"AdaptiveBackpropCallback": "gtcompile.lightning.callback"}

__all__ = sorted(_NAMES)
__getattr__ = lazy_names(__name__, _NAMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
