"""Selection of the parameters to train within a budget."""
