"""`python -m benchmarks.gpu` measures on a GPU, stage by stage."""

import typer

from benchmarks.gpu.command import main

if __name__ == "__main__":
    typer.run(main)
