"""Everything that gtcompile promises on a GPU, measured by one command: `python -m benchmarks.gpu`."""
