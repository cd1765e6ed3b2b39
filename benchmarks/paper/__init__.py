"""The cost tables of the GreenTrainer paper, from graphs alone."""
