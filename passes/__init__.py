"""Rewrites of graphs, one per module, all with the interface of `contract`; `pipeline` puts some in order."""
