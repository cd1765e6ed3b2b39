"""From the joint graph to the FLOPs of any set of trained parameters."""
