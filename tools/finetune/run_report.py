"""The report in a run's folder, rewritten at every selection and at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gtcompile.capture.capture import capture
from gtcompile.state.restore import everything_trainable
from gtcompile.tools.finetune.progress import Reporter
from gtcompile.tools.inspect import Traced, inspection_of_run, write_report
from gtcompile.tools.runs.run_record import read_run

FILE = "report.html"


class RunReport:
    """Writes `report.html` of a run; captures the model once, or every time if it branches on data.

    Args:
        folder: of the run.
        reporter: says if the report cannot be written; the run continues then.
    """

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self._folder, self._reporter = folder, reporter
        self._traced: Traced | None = None

    def write(self, module: nn.Module, batch: Mapping[str, Any]) -> None:
        """Replace the report by one of the folder's current content.

        Args:
            module: the model, with or without compiled blocks; nothing in it changes.
            batch: any batch of the run.
        """
        if self._traced is None or self._traced.values:
            with everything_trainable(module):
                self._traced = Traced(capture(module, batch), "the weights and a batch at its last change")
        inspection = inspection_of_run(read_run(self._folder), self._traced, type(module).__name__)
        try:
            write_report(inspection, self._folder / FILE)
        except OSError as error:
            self._reporter.say(
                f"{FILE} could not be written ({error.strerror}); the run continues. "
                f"Later: gtcompile inspect {self._folder} --html FILE"
            )
