"""Passes that store weights and compute with numbers of few bits."""
