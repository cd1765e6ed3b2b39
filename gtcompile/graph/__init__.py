"""The joint forward/backward graph as a value, and what its nodes cost."""
