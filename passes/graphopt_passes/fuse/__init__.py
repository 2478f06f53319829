"""Passes that merge nodes into fewer, by algebra on their constants."""
