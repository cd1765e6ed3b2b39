"""`gtcompile bench`: steps at several budgets beside what people do today."""
