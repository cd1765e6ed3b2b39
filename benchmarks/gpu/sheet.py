"""A table of results, printed on a terminal or written as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.measurement import verdict
from gtcompile.tools.bench.measurement import Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The results of one stage."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdicts: Sequence[str] = ()
    """One line per target, and remarks on what could not be measured."""

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For the documentation."""
        lines = [f"## {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        lines += ["", *(f"* {line}" for line in self.verdicts)]
        return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def against(what: str, found: Spread, limit: float) -> str:
    """A target: what was measured, with its spread, and whether the median keeps an upper limit."""
    return f"{what} {found}: {verdict(found.median, limit)}"
