"""Adaptive backpropagation in the trainers of transformers and TRL."""
