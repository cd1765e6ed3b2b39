"""`make demo`: the embedded model fine-tuned at half the FLOPs and in full, side by side."""
