"""Parts of samples: apart from each other, and the same in whatever order samples come."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from tuned import classifier, vectors

from graphopt.parting import SHARED_BELOW, Parts, items_to_prove, part
from graphopt.recording import Feed
from graphopt.samples import read_samples
from graphopt.signature import signature

INPUTS = signature(classifier())


def feed(samples: object, state: tuple[tuple[str, str], ...] = ()) -> Feed:
    return Feed(read_samples(samples, INPUTS, state), INPUTS, state)  # type: ignore[arg-type]


def contents(one: Feed) -> list[str]:
    return list(one.samples.digests)


def three(parts: Parts) -> list[list[str]]:
    return [contents(one) for one in (parts.fitted, parts.judged, parts.verified)]


@pytest.mark.parametrize("count", [12, 13, 40, 300])
@pytest.mark.parametrize("least", [None, 5, 10_000])
def test_no_sample_is_in_two_parts_and_none_is_lost(count: int, least: int | None) -> None:
    whole = feed(vectors(count))

    parts = part(whole, least)

    assert not parts.shared
    for first, second in combinations(three(parts), 2):
        assert not set(first) & set(second)
    fitted, judged, verified = three(parts)
    assert sorted(fitted + judged + verified) == sorted(contents(whole))
    assert sorted(contents(parts.searched)) == sorted(fitted + judged)
    assert min(map(len, three(parts))) > 0


def test_half_verify_where_that_proves_something_and_a_fifth_else() -> None:
    whole = feed(vectors(200))

    assert len(part(whole, 100).verified.samples) == 100
    assert len(part(whole, 101).verified.samples) == 40
    assert len(part(whole, None).verified.samples) == 40


@pytest.mark.parametrize(
    ("count", "least", "counts"),
    [(300, None, [128, 112, 60]), (600, None, [128, 256, 216]), (600, 300, [128, 172, 300])],
)
def test_beyond_what_is_fitted_by_samples_judge_and_then_verify(
    count: int, least: int | None, counts: list[int]
) -> None:
    parts = part(feed(vectors(count)), least)

    assert [len(one) for one in three(parts)] == counts


def test_equal_samples_never_come_into_two_parts() -> None:
    given = list(vectors(30))

    parts = part(feed([*given, *given, *given[:7]]), None)

    fitted, judged, verified = three(parts)
    found = fitted + judged + verified
    assert len(found) == len(set(found)) == 30


@pytest.mark.parametrize("count", [1, 2, SHARED_BELOW - 1])
def test_too_few_serve_for_everything(count: int) -> None:
    whole = feed(vectors(count))

    parts = part(whole, 1)

    assert parts.shared
    assert parts.fitted is parts.judged is parts.searched is parts.verified is whole


def test_many_of_which_few_differ_are_too_few() -> None:
    assert part(feed([next(vectors(1))] * 100), None).shared


def test_neither_order_nor_names_matter(tmp_path: Path) -> None:
    given = list(vectors(50))
    for name, order in (("a", range(50)), ("b", reversed(range(50)))):
        (tmp_path / name).mkdir()
        for number, index in enumerate(order):
            np.savez(tmp_path / name / f"{name}{number:02d}.npz", **given[index])

    found = [part(feed(tmp_path / name), 10) for name in ("a", "b")]
    found.append(part(feed(given), 10))

    sets = [[set(one) for one in three(parts)] for parts in found]
    assert sets[0] == sets[1] == sets[2]


def test_another_seed_is_another_division() -> None:
    whole = feed(vectors(60))
    first, again, other = (part(whole, None, seed) for seed in (0, 0, 1))

    assert three(first) == three(again)
    assert set(contents(first.verified)) != set(contents(other.verified))


def test_sequences_stay_whole(tmp_path: Path) -> None:
    lengths = [1 + number % 4 for number in range(20)]
    given = list(vectors(sum(lengths)))
    for number, length in enumerate(lengths):
        (tmp_path / f"s{number:02d}").mkdir()
        for step in range(length):
            np.savez(tmp_path / f"s{number:02d}" / f"{step}.npz", **given.pop())
    # The same once more, of which nothing comes into another part.
    shutil.copytree(tmp_path / "s03", tmp_path / "s99")
    whole = feed(tmp_path, (("y", "x"),))
    sequences = whole.samples.sequences
    known = {tuple(whole.samples.digests[i] for i in one) for one in sequences}

    parts = part(whole, None)

    found = [
        tuple(one.samples.digests[i] for i in sequence)
        for one in (parts.fitted, parts.judged, parts.verified)
        for sequence in one.samples.sequences
    ]
    assert set(found) == known
    assert len(found) == 20


@pytest.mark.parametrize(
    ("limit", "upper", "expected"),
    [(0.0, 100.0, None), (-1.0, 100.0, None), (1.0, np.inf, None), (200.0, 100.0, 0)],
)
def test_where_no_number_of_items_proves_it(
    limit: float, upper: float, expected: int | None
) -> None:
    assert items_to_prove(limit, 0.05, 0.0, upper) == expected


def test_a_smaller_drop_takes_more_items_to_prove() -> None:
    counts = [items_to_prove(limit, 0.05, 0.0, 100.0) for limit in (5.0, 1.0, 0.2)]

    assert counts == sorted(counts)  # type: ignore[type-var]
    assert counts[1] == pytest.approx(332, abs=40)
