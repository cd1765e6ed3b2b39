"""`python -m benchmarks.torch_databases` trains every operator and module of PyTorch's test databases."""

import torch
import typer

from benchmarks.torch_databases.report import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
