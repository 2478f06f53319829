"""Ranges of activations from what was observed of them."""

from __future__ import annotations

import numpy as np

from graphopt.statistics import Spread


def candidate_ranges(spread: Spread) -> dict[str, tuple[float, float]]:
    """Lowest and highest number to cover, by method."""
    found = {"min-max": (spread.low, spread.high)}
    if not spread.count:
        return found
    counts, edges = spread.histogram.counts, spread.histogram.edges()
    cumulated = np.cumsum(counts) / counts.sum()
    for share in (0.999, 0.9999, 0.99999):
        high = edges[min(int(np.searchsorted(cumulated, share)) + 1, len(edges) - 1)]
        low = edges[int(np.searchsorted(cumulated, 1 - share))]
        found[f"percentile {share:.3%}"] = (
            max(spread.low, float(low)) if spread.low < 0 else 0.0,
            min(spread.high, float(high)),
        )
    best = None
    centres = (edges[1:] + edges[:-1]) / 2
    used = counts > 0
    c, x = counts[used], centres[used]
    for a in np.linspace(0.3, 1, 29):
        for b in [1.0] if spread.low >= 0 else np.linspace(0.3, 1, 15):
            low, high = min(spread.low, 0.0) * b, max(spread.high, 0) * a
            step = (high - low) / 255
            if step <= 0:
                continue
            error = np.where((x < low) | (x > high), (x - np.clip(x, low, high)) ** 2, step**2 / 12)
            total = float((c * error).sum())
            if best is None or total < best[0]:
                best = total, (low, high)
    if best is not None:
        found["mse"] = best[1]
    return found
