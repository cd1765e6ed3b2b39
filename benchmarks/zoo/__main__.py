"""`python -m benchmarks.zoo` checks many architectures."""

import typer

from benchmarks.zoo.results import main

if __name__ == "__main__":
    typer.run(main)
