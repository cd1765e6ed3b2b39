"""Which parameters are trained, and everything put back as it was: flags, optimizer state, random states."""
