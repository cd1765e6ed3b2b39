"""What is trained now, and how to leave a training as it was: flags, gradients, buffers, optimizer state."""
