"""Ranges of activations from what was observed of them."""

from __future__ import annotations

from graphopt.statistics import Spread


def candidate_ranges(spread: Spread) -> dict[str, tuple[float, float]]:
    """Lowest and highest number to cover, by method."""
    return {"min-max": (spread.low, spread.high)}
