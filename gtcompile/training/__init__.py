"""Adaptive backpropagation in a training loop, its checkpoints, and data parallelism."""
