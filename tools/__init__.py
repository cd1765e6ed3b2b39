"""What people run on graphs and models: fine-tuning, inspection, benchmarks, the demo."""
