"""What several processes agree on, and models sharded with FSDP2."""
