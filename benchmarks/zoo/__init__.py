"""Gradients and FLOPs on many architectures, each against eager PyTorch."""
