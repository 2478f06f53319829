"""Passes that store or compute once what a graph has several times."""
