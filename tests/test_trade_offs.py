from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graphopt.trade_offs import front

COSTS = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(COSTS, COSTS), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)

    assert front(points) == sorted({point for point in points if not beaten(point)})


def test_it_is_told_from_a_plain_example() -> None:
    assert front([(3, 0), (1, 2), (2, 2), (1, 5), (3, 0)]) == [(1, 2), (3, 0)]
