"""Importance: by how much training a parameter is predicted to reduce the loss."""
