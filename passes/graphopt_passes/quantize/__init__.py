"""Passes that store and compute in narrow numbers."""
