"""The HTML report of an inspection: one file that opens offline and loads nothing."""

import json
from importlib.resources import files
from pathlib import Path

from gtcompile.tools.common.files import write_text
from gtcompile.tools.inspect.inspection import Inspection
from gtcompile.tools.inspect.report_data import report_data


def write_report(inspection: Inspection, path: Path) -> None:
    """Write the report of an inspection, whole or not at all.

    Raises:
        OSError: the file cannot be written; what was there before is still there.
    """
    write_text(path, report_page(inspection))


def report_page(inspection: Inspection) -> str:
    """The report as one HTML page."""
    template = files("gtcompile.tools.inspect") / "report_page"
    page, style, script = (
        (template / name).read_text("utf-8") for name in ("report.html", "report.css", "report.js")
    )
    data = json.dumps(report_data(inspection), separators=(",", ":"), allow_nan=False)
    page = page.replace("/* STYLE */", style).replace("/* SCRIPT */", script)
    return page.replace("DATA_OF_THE_REPORT", data.replace("<", "\\u003c"))
