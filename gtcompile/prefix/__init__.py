"""Outputs of frozen blocks near the input, computed once per example."""
