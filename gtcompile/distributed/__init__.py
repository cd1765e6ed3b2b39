"""Collective calls on Python values, and models sharded with FSDP2."""
