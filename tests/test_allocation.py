from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest

from graphopt.allocation import Choice, closest_within, front, smallest_within


def random_choices(seed: int) -> list[list[Choice]]:
    """Forms of six weights, on a convex curve each."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(6):
        size, harm = rng.integers(100, 10_000), rng.exponential()
        forms = [Choice(int(size * bits / 8), float(harm * 4.0**-bits)) for bits in (2, 3, 4, 6)]
        found.append([Choice(int(size * 4), 0.0), *forms])
    return found


def totals(choices: list[list[Choice]], chosen: object) -> tuple[int, float]:
    picked = [forms[i] for forms, i in zip(choices, chosen, strict=True)]  # type: ignore[call-overload]
    return sum(c.stored_bytes for c in picked), sum(c.square for c in picked)


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_within_an_error_is_nearly_the_best_of_all(seed: int) -> None:
    choices = random_choices(seed)
    limit = 0.05

    stored_bytes, square = totals(choices, smallest_within(choices, limit))

    assert square <= limit
    every = (totals(choices, chosen) for chosen in product(range(5), repeat=6))
    best = min(b for b, s in every if s <= limit)
    # What one weight takes more in the next wider form.
    step = max(forms[4].stored_bytes - forms[3].stored_bytes for forms in choices)
    assert best <= stored_bytes <= best + step


@pytest.mark.parametrize("seed", range(6))
def test_the_closest_within_bytes_is_nearly_the_best_of_all(seed: int) -> None:
    choices = random_choices(seed)
    limit = sum(forms[2].stored_bytes for forms in choices)

    stored_bytes, square = totals(choices, closest_within(choices, limit))

    assert stored_bytes <= limit
    every = [totals(choices, chosen) for chosen in product(range(5), repeat=6)]
    assert square <= 3 * min(s for b, s in every if b <= limit)


@pytest.mark.parametrize("seed", range(6))
def test_of_the_bytes_nothing_is_left_that_one_weight_could_use(seed: int) -> None:
    choices = random_choices(seed)
    limit = sum(forms[2].stored_bytes for forms in choices)
    chosen = closest_within(choices, limit)
    _, square = totals(choices, chosen)

    for index, place in product(range(6), range(5)):
        other = [*chosen[:index], place, *chosen[index + 1 :]]
        taken, better = totals(choices, other)
        assert taken > limit or better >= square


@pytest.mark.parametrize("seed", range(6))
def test_of_the_error_nothing_is_left_that_one_weight_could_use(seed: int) -> None:
    choices, limit = random_choices(seed), 0.05
    chosen = smallest_within(choices, limit)
    stored_bytes, _ = totals(choices, chosen)

    for index, place in product(range(6), range(5)):
        smaller, square = totals(choices, [*chosen[:index], place, *chosen[index + 1 :]])
        assert square > limit or smaller >= stored_bytes


def test_of_two_weights_more_can_be_had_than_the_hull() -> None:
    """A price takes the narrow form of both or of none, as both gain alike."""
    choices = [[Choice(100, 0.0), Choice(50, 1.0)], [Choice(100, 0.0), Choice(50, 1.0)]]

    assert totals(choices, smallest_within(choices, 1.5)) == (150, 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_the_front_is_the_lower_hull_of_all_that_can_be_had(seed: int) -> None:
    choices = random_choices(seed)
    every = [totals(choices, chosen) for chosen in product(range(5), repeat=6)]

    points = [totals(choices, chosen) for chosen in front(choices)]

    sizes, squares = zip(*points, strict=True)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert list(squares) == sorted(squares)
    assert squares[0] == min(square for _, square in every)
    assert sizes[-1] == min(size for size, _ in every)
    for size, square in points[1:-1]:
        # Nothing is better in both, and for some price it is the best of all.
        assert not any(s <= size and q <= square and (s, q) != (size, square) for s, q in every)
    for (larger, less), (smaller, more) in pairwise(points):
        price = (larger - smaller) / (more - less)
        cost = larger + price * less
        # A corner between two of them may be missed by the prices that are tried, of which each is
        # 1.4 times the next.
        assert min(s + price * q for s, q in every) >= 0.8 * cost


def test_a_form_that_another_is_better_than_in_both_is_never_taken() -> None:
    choices = [[Choice(100, 0.0), Choice(60, 5.0), Choice(50, 1.0), Choice(10, 9.0)]]

    assert front(choices) == [[0], [2], [3]]


def test_infinite_errors_are_never_taken() -> None:
    choices = [[Choice(0, 0.0), Choice(-50, math.inf), Choice(-20, 0.5)]]

    assert front(choices) == [[0], [2]]
    assert smallest_within(choices, 1e9) == [2]


def test_no_error_at_all_leaves_all_as_it_is() -> None:
    assert smallest_within(random_choices(0), 0.0) == [0] * 6


def test_fewer_bytes_than_there_can_be_give_the_smallest() -> None:
    assert closest_within(random_choices(0), 0) == [1] * 6


def test_no_weights() -> None:
    assert smallest_within([], 1.0) == []
    assert front([]) == [[]]
    assert closest_within([], 1.0) == []
