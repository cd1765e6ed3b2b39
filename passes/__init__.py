"""Rewrites of joint graphs, one per module; `pipeline` puts them in order."""
