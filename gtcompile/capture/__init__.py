"""From a model and a batch to the joint graph of its forward and backward."""
