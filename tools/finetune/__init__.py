"""`gtcompile finetune`: train within a budget, stop and resume, evaluate."""

from typing import TYPE_CHECKING

from gtcompile.lazy_names import lazy_names

if TYPE_CHECKING:
    from gtcompile.tools.data.answers import generate_answers as generate_answers
    from gtcompile.tools.finetune.progress import Reporter as Reporter
    from gtcompile.tools.finetune.run import compare_with_full as compare_with_full
    from gtcompile.tools.finetune.run import finetune as finetune
    from gtcompile.tools.finetune.summary import show as show

_NAMES = {
    "Reporter": "gtcompile.tools.finetune.progress",
    "compare_with_full": "gtcompile.tools.finetune.run",
    "finetune": "gtcompile.tools.finetune.run",
    "generate_answers": "gtcompile.tools.data.answers",
    "show": "gtcompile.tools.finetune.summary",
}

__all__ = sorted(_NAMES)
__getattr__ = lazy_names(__name__, _NAMES)
