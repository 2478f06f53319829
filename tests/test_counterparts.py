from __future__ import annotations

import numpy as np
import pytest

from graphopt.counterparts import Likeness, in_order, likenesses


def _look(seed: int, count: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def test_a_value_is_known_by_what_it_holds_whatever_its_name() -> None:
    first, second = _look(0), _look(1)
    theirs = {"a": ((8, 8), first), "b": ((8, 8), second)}
    ours = {"a": ((8, 8), second + 0.01 * first), "new": ((8, 8), 3 * first - 1)}

    found = {pair.name: (pair.twin, pair.place) for pair in likenesses(ours, theirs)}

    assert found == {"a": ("b", 1), "new": ("a", 0)}


def test_another_shape_or_nothing_in_common_is_no_counterpart() -> None:
    theirs = {"a": ((8, 8), _look(0))}
    ours = {
        "flat": ((64,), _look(0)),
        "other": ((8, 8), _look(5)),
        "negated": ((8, 8), -_look(0)),
        "constant": ((8, 8), np.ones(64, np.float32)),
    }

    assert likenesses(ours, theirs) == []


def test_of_equals_the_last_is_taken() -> None:
    theirs = {"made": ((8, 8), _look(0)), "copied": ((8, 8), _look(0))}

    (pair,) = likenesses({"x": ((8, 8), _look(0))}, theirs)

    assert pair.twin == "copied"


def test_of_a_value_and_its_multiple_the_nearest_is_taken_where_that_is_asked_for() -> None:
    noisy = _look(0) + 0.001 * _look(1)
    theirs = {"value": ((8, 8), _look(0)), "multiple": ((8, 8), 8 * _look(0))}

    (near,) = likenesses({"x": ((8, 8), noisy)}, theirs, nearest=True)
    (far,) = likenesses({"x": ((8, 8), 8 * noisy)}, theirs, nearest=True)

    assert (near.twin, near.place) == ("value", 0)
    assert (far.twin, far.place) == ("multiple", 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("nearest", [False, True])
def test_what_is_not_finite_is_no_counterpart_and_does_no_harm_to_others(nearest: bool) -> None:
    masked = _look(0)
    masked[3] = -np.inf
    huge = np.full(64, 3e38, np.float32)
    looks = {"masked": ((8, 8), masked), "huge": ((8, 8), huge), "plain": ((8, 8), _look(1))}

    assert [pair.name for pair in likenesses(looks, looks, nearest)] == ["plain"]


def test_pairs_that_go_back_are_left_out() -> None:
    pairs = [
        Likeness("a", "1", 1, 0.9),
        Likeness("b", "9", 9, 0.8),
        Likeness("c", "2", 2, 0.9),
        Likeness("d", "2", 2, 0.7),
        Likeness("e", "3", 3, 0.9),
    ]

    assert in_order(pairs) == [("a", "1"), ("c", "2"), ("d", "2"), ("e", "3")]
    assert in_order([]) == []
