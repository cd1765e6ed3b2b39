"""The report in a run's folder, rewritten at every selection and at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gtcompile.capture import capture
from gtcompile.joint import JointGraph
from gtcompile.restoration import everything_trainable
from gtcompile.tools.inspection import inspection_of_run
from gtcompile.tools.progress import Reporter
from gtcompile.tools.report import write_report
from gtcompile.tools.run_record import read_run

FILE = "report.html"


class RunReport:
    """Writes `report.html` of a run; the model is captured once.

    Args:
        folder: of the run.
        reporter: told when the report cannot be written, which ends no run.
    """

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self._folder, self._reporter = folder, reporter
        self._joint: JointGraph | None = None

    def write(self, module: nn.Module, batch: Mapping[str, Any]) -> None:
        """Replace the report by one of what the folder holds now.

        Args:
            module: the model, with or without compiled blocks; nothing in it changes.
            batch: any of the run's.
        """
        if self._joint is None:
            with everything_trainable(module):
                self._joint = capture(module, batch)
        inspection = inspection_of_run(read_run(self._folder), self._joint, type(module).__name__)
        try:
            write_report(inspection, self._folder / FILE)
        except OSError as error:
            self._reporter.say(
                f"{FILE} could not be written ({error.strerror}); the run goes on. "
                f"Later: gtcompile inspect {self._folder} --html FILE"
            )
