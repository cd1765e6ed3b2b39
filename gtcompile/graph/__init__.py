"""The joint forward/backward graph, and the FLOPs of its nodes."""
