"""The page of a comparison: one HTML file that explains what it shows, opens offline and loads nothing."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from gtcompile.tools.common.files import write_text
from gtcompile.tools.compare.arms import ARMS
from gtcompile.tools.compare.datasets import Data
from gtcompile.tools.compare.options import CompareOptions
from gtcompile.tools.compare.report import Table

_MEANINGS = {
    "loss": "mean negative logarithm of the probability of the answer's tokens, in nats; lower is better",
    "rouge1": "words that the generated answer shares with a reference (F-measure in percent); of several "
    "references, the one with the highest score counts; higher is better",
    "rouge2": "the same for pairs of neighbouring words",
    "rougeL": "the same for the longest common sequence of words",
    "exact match": "percentage of texts whose generated answer equals an accepted one, apart from case, "
    "articles and punctuation; higher is better",
    "accuracy": "percentage of texts whose right answer the model finds likelier than the wrong one; higher "
    "is better",
}
_PLOTS = {
    "loss_by_flops": "Loss in the course of the training, by FLOPs. A lower line learns more from the same "
    "work.",
    "loss_by_seconds": "Loss in the course of the training, by time. It depends on the machine and on what "
    "else ran there.",
    "loss_by_memory": "Loss at the end, by the peak memory of the training.",
    "scores_by_flops": "Scores at the end, by FLOPs of the whole training: the mean over the seeds, and a "
    "line from the lowest to the highest.",
}


def write_page(
    options: CompareOptions,
    data: Data,
    tables: Sequence[Table],
    plots: Sequence[str],
    measured: Iterable[str],
) -> None:
    """Write `index.html` into the output folder.

    Args:
        options: of the comparison.
        data: of the comparison.
        tables: of the finished runs.
        plots: names of the plots in the output folder.
        measured: names of the measured values.
    """
    template = files("gtcompile.tools.compare").joinpath("page.html").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(
        options=options,
        data=str(data),
        tables=tables,
        plots=[(_picture(options.output / f"{name}.svg"), _PLOTS[name]) for name in plots],
        meanings={name: _MEANINGS[name] for name in measured},
        arms=_arms_in(tables),
    )
    write_text(options.output / "index.html", page)


def _arms_in(tables: Iterable[Table]) -> dict[str, Any]:
    """The methods that the tables have, by name."""
    shown = {row[0].partition(" at ")[0] for table in tables for row in table.rows}
    return {name: arm for name, arm in ARMS.items() if name in shown}


def _picture(path: Path) -> str:
    return f"data:image/svg+xml;base64,{b64encode(path.read_bytes()).decode()}"
