"""Which parameters to train within a budget."""
