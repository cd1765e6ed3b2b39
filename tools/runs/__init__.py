"""A fine-tuning run as files: its settings, its folder, and what can be read from it."""
