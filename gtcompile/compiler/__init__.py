"""From a captured graph to compiled code for any set of trained parameters."""
