"""`gtcompile inspect`: what a step costs, what is trained and why, as text, HTML, JSON or a graph."""

from typing import TYPE_CHECKING

from gtcompile.lazy_names import lazy_names

if TYPE_CHECKING:
    from gtcompile.tools.inspect.command import Traced as Traced
    from gtcompile.tools.inspect.command import inspection_of_run as inspection_of_run
    from gtcompile.tools.inspect.report import write_report as write_report

_NAMES = {
    "Traced": "gtcompile.tools.inspect.command",
    "inspection_of_run": "gtcompile.tools.inspect.command",
    "write_report": "gtcompile.tools.inspect.report",
}

__all__ = sorted(_NAMES)
__getattr__ = lazy_names(__name__, _NAMES)
