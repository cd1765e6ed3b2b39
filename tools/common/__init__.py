"""What several of the tools share."""
