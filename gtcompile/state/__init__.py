"""The trained set, and restoring what a measurement changes: flags, gradients, buffers, optimizer state."""
