"""Passes that remove weights and structures: what a model does not need is not computed."""
