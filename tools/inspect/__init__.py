"""`gtcompile inspect`: what a step costs, what is trained and why, as text, HTML, JSON or a graph."""

from typing import TYPE_CHECKING

from gtcompile.lazy_names import lazy_names

if TYPE_CHECKING:
    from gtcompile.tools.inspect.command import inspect_run as inspect_run
    from gtcompile.tools.inspect.report import write_report as write_report

_NAMES = {
    "inspect_run": "gtcompile.tools.inspect.command",
    "write_report": "gtcompile.tools.inspect.report",
}

__all__ = sorted(_NAMES)
__getattr__ = lazy_names(__name__, _NAMES)
