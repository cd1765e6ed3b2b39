"""`gtcompile export`: the training step of a trained set as ONNX."""
