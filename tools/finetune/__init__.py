"""`gtcompile finetune`: train within a budget, stop and resume, evaluate."""
