"""How much training each parameter is predicted to reduce the loss."""
