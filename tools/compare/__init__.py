"""`gtcompile compare`: fine-tuning methods compared by held-out loss, at equal steps and at equal FLOPs."""
