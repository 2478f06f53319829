"""How many samples a search can afford, by how long the original takes for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tuned import classifier, vectors

from graphopt.pace import glanced_samples, seconds_per_sample, share_of_samples
from graphopt.parting import part
from graphopt.probe_cache import ProbeCache
from graphopt.subject import open_subject


@pytest.mark.parametrize(
    ("sample_s", "share"),
    [(1e-6, 1), (0.0117, 1), (0.0118, 1 / 2), (0.024, 1 / 4), (0.05, 1 / 8), (100.0, 1 / 8)],
)
def test_where_samples_take_long_fewer_are_fitted_and_searched_by(
    sample_s: float, share: float
) -> None:
    # In a hundredth of the time, samples that take a hundredth of it.
    assert share_of_samples(sample_s, 600.0) == share_of_samples(sample_s / 100, 6.0) == share


def test_many_probes_are_made_with_fewer_samples_each() -> None:
    found = [glanced_samples(probes, 0.01, 600.0) for probes in (0, 1, 117, 118, 300, 10_000)]

    assert found == [128, 128, 128, 64, 32, 16]


def test_how_long_a_sample_takes_is_measured_once(tmp_path: Path) -> None:
    subject = open_subject(classifier(), "cpu", True, True, lambda _: None)
    feed = subject.feed(list(vectors(4)), None, ())
    cache = ProbeCache(tmp_path)

    first = seconds_per_sample(subject, feed, cache)

    assert 0 < first < 1
    assert seconds_per_sample(subject, feed, cache) == first
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_what_is_not_fitted_or_searched_by_verifies() -> None:
    subject = open_subject(classifier(), "cpu", True, True, lambda _: None)
    feed = subject.feed(list(vectors(400)), None, ())

    whole, quarter = (part(feed, None, share=share) for share in (1.0, 1 / 4))

    assert whole.counts == (128, 192, 80)
    assert quarter.counts == (32, 64, 304)
    assert whole.capped and quarter.capped
    assert not part(subject.feed(list(vectors(64)), None, ()), None).capped
