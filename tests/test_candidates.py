"""Which of the candidates of a search is best."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.building import Built
from graphopt.candidates import Candidate, best_first
from graphopt.gauge import Gauged
from graphopt.scenarios import Objective


def candidate(name: str, stored_bytes: int, latency: float | None, drop: float = 0.0) -> Candidate:
    built = Built(Path(name), name, (), stored_bytes, 0.0, 0.0, drop, None)
    return Candidate("float", built, Gauged(drop, drop, 0.0), {}, "", latency)


def names(candidates: list[Candidate], objective: Objective) -> list[str]:
    return [one.built.passes for one in best_first(candidates, objective)]


@pytest.mark.parametrize("objective", ["size", "latency", "memory"])
def test_there_may_be_none(objective: Objective) -> None:
    assert best_first([], objective) == []


def test_by_size_the_smallest_is_first() -> None:
    found = [candidate("b", 300, 0.4), candidate("a", 200, 1.0), candidate("c", 300, 0.4, -1.0)]

    assert names(found, "size") == ["a", "c", "b"]


@pytest.mark.parametrize(
    ("stored_bytes", "latency", "first"),
    [
        (109, 0.5, "other"),
        # So many bytes are not as good, and so little time may be chance.
        (111, 0.5, "smallest"),
        (109, 0.95, "smallest"),
        (109, None, "smallest"),
    ],
)
def test_a_file_that_is_nearly_as_small_comes_first_if_it_is_faster_for_certain(
    stored_bytes: int, latency: float | None, first: str
) -> None:
    found = [candidate("smallest", 100, 1.0), candidate("other", stored_bytes, latency)]

    assert names(found, "size")[0] == first
    assert sorted(names(found, "size")) == ["other", "smallest"]


def test_of_those_that_are_as_fast_the_smallest_is_first() -> None:
    found = [
        candidate("fastest", 300, 0.400),
        candidate("as fast", 200, 0.403),
        candidate("slower", 100, 0.412),
        candidate("not timed", 50, None),
    ]

    assert names(found, "latency") == ["as fast", "fastest", "slower", "not timed"]
