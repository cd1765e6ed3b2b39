"""Does it pay? Fine-tuning methods compared by loss on held-out data, at equal steps and at equal FLOPs."""
