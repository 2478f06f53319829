"""How far outputs are from the original's, by the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from graphopt.output_distance import relative_entropy, square_share


def rows(seed: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4))


@pytest.mark.parametrize("sharpness", [1.0, 0.3, 7.0])
def test_it_is_the_relative_entropy_of_the_softmax(sharpness: float) -> None:
    old, new = rows(0), rows(1)

    found = relative_entropy(old, new, sharpness)

    p, q = softmax(sharpness * old, -1), softmax(sharpness * new, -1)
    assert found == pytest.approx(rel_entr(p, q).sum(-1).mean())


def test_probabilities_are_taken_as_they_are() -> None:
    p, q = softmax(rows(0), -1), softmax(rows(1), -1)

    assert relative_entropy(p, q, None) == pytest.approx(rel_entr(p, q).sum(-1).mean())


def test_no_chance_at_all_costs_much_and_not_everything() -> None:
    sure, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])

    assert 15 < relative_entropy(sure, other, None) < 20
    assert relative_entropy(sure, sure, None) == 0


def test_it_grows_with_the_square_of_a_small_change() -> None:
    old, change = rows(0), rows(1)

    small, large = (relative_entropy(old, old + e * change, 1.0) for e in (1e-3, 1e-2))

    assert large / small == pytest.approx(100, rel=0.05)


def test_what_all_classes_have_more_of_is_no_change() -> None:
    assert relative_entropy(rows(0), rows(0) + 3.0, 1.0) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    new = rows(0)
    new[1, 2] = value

    assert relative_entropy(rows(0), new, 1.0) == math.inf
    assert square_share(rows(0), new, 1.0) == math.inf


def test_numbers_by_their_squares() -> None:
    old = np.array([1.0, 2.0, np.nan])

    assert square_share(old, np.array([1.0, 4.0, np.nan]), 8.0) == pytest.approx(0.5)
    assert square_share(old, old, 0.0) == 0
    assert square_share(old, old + 1, 0.0) == math.inf
