"""Data sets: their files, their texts, and batches of token ids."""
