"""What steps take in seconds and bytes: timed, or read off the graph and torch's partitioner."""
