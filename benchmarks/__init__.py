"""Experiments and the tables of the documentation; not part of the installed package."""
