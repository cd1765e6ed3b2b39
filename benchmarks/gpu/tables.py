"""`python -m benchmarks.gpu.tables FOLDER`: the results of `python -m benchmarks.gpu` as Markdown."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.records import read
from benchmarks.gpu.stages import STAGES


def markdown(folder: Path) -> str:
    """The tables of all stages that have results.

    Raises:
        ValueError: the folder has none.
    """
    saved = [found for name in STAGES if (found := read(folder, name))]
    if not saved:
        raise ValueError(f"{folder} has no results of python -m benchmarks.gpu")
    tables = [STAGES[found.stage].module.sheet(found).markdown() for found in saved]
    return "\n".join([f"{saved[0].header}\n", *tables])


def main(folder: Annotated[Path, typer.Argument(help="the folder given as --output")]) -> None:
    """Print the tables of a folder of results."""
    try:
        typer.echo(markdown(folder))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
