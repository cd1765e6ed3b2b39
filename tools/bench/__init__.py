"""`gtcompile bench`: steps at several budgets, compared with full training and eager freezing."""
