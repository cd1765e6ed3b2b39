"""Every operator and module of PyTorch's own test databases, trained and compared with eager PyTorch.

A *subject* is a differentiable operator of `op_db` or a module of `module_db`. It is applied to its sample
inputs, between two trained scalars, in up to three *forms*: plain, behind a graph break, and in place. Each
form is compiled with both kinds of variants and trains random sets. Eager PyTorch says what is right.

Several subjects make one model, which is split in halves where something is not right.
"""
