"""How far outputs are from the original's, where changes count that leave answers as they are.

It grows with the square of a small change, and few samples show it. So a search can compare models
by it of which none has yet another answer, and foretell what several changes do together.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_softmax

PROBABILITY_MINIMUM = 1e-8
"""What is taken for no chance at all: float32 says no less of a probability."""


def relative_entropy(old: np.ndarray, new: np.ndarray, sharpness: float | None) -> float:
    """The mean over rows of sum p log(p / q), in nats (Kullback and Leibler 1951).

    Args:
        old: the original's, of which p is, [rows, classes], float64.
        new: of the same shape.
        sharpness: rows become probabilities by the softmax of their product with it; None where
            they are probabilities.
    """
    if not np.isfinite(new).all():
        return math.inf
    if sharpness is None:
        p = np.maximum(old, PROBABILITY_MINIMUM)
        log_p, log_q = np.log(p), np.log(np.maximum(new, PROBABILITY_MINIMUM))
    else:
        log_p, log_q = (log_softmax(rows * sharpness, axis=-1) for rows in (old, new))
        p = np.exp(log_p)
    return max(float((p * (log_p - log_q)).sum() / len(old)), 0.0)


def square_share(old: np.ndarray, new: np.ndarray, variation: float) -> float:
    """The squared error over the variation of the original; infinite where they cannot be compared.

    Args:
        old: the original's, float64, of any shape.
        new: of the same shape.
        variation: the sum of squared distances from the mean of the original, in a sample.
    """
    finite = np.isfinite(old)
    if not np.array_equal(finite, np.isfinite(new)):
        return math.inf
    square = float(((new[finite] - old[finite]) ** 2).sum())
    return square / variation if variation else (math.inf if square else 0.0)
