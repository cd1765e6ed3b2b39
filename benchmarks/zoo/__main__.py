"""`python -m benchmarks.zoo` checks many architectures and writes a table."""

import typer

from benchmarks.zoo.table import main

if __name__ == "__main__":
    typer.run(main)
