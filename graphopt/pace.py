"""What the clock says in a search: how fast models are, and how many samples it can afford.

Numbers of samples are halved until they fit, so that they are the same wherever a sample takes
about as long. What was measured is kept: a search that goes on has the same samples, and the same
order of candidates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from graphopt import loading, runtime
from graphopt.benchmark import cpu_name, latency_ratio
from graphopt.parting import FITTED_MAXIMUM, JUDGED_MAXIMUM
from graphopt.probe_cache import ProbeCache, cache_key
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.subject import Subject
from graphopt.trial import GLANCED_MAXIMUM

TIMED = 8
"""Samples that the original is timed on: the fastest counts, as whatever disturbs only delays."""

JUDGED_SHARE, PROBED_SHARE = 1 / 80, 1 / 4
"""Of the time, what runs take at most: of one candidate among twenty, and of all probes together.
Building what is run takes as long, and two processes do it in half of the time."""

SHARE_MINIMUM = 1 / 8
"""Fewer samples than that say too little, however long they take."""


def seconds_per_sample(subject: Subject, feed: Feed, cache: ProbeCache) -> float:
    """What the original takes for a sample at one thread; measured once on each machine.

    Args:
        subject: the model as it was given.
        feed: samples, of which the first few are run.
        cache: of what was found before.

    Raises:
        GraphoptError: onnxruntime does not run it.
    """
    of = subject.source.sha256(), feed.samples.digests[0]
    return _once("seconds", of, subject, cache, lambda: _fastest(subject, feed))


def latency_over(subject: Subject, path: Path, feed: Feed, cache: ProbeCache) -> float:
    """The latency of a model over that of the original; measured once on each machine.

    Args:
        subject: the original, as it was given.
        path: of the model, which the name of the file stands for.
        feed: samples.
        cache: of what was found before.

    Raises:
        GraphoptError: onnxruntime does not run it.
    """
    original, provider = subject.source.model, subject.provider
    of = path.stem, subject.source.sha256()
    return _once(
        "latency",
        of,
        subject,
        cache,
        lambda: latency_ratio(original, loading.load(path), feed.samples, provider),
    )


def _once(
    what: str,
    of: tuple[str, ...],
    subject: Subject,
    cache: ProbeCache,
    measure: Callable[[], float],
) -> float:
    """What was measured on this machine before, or is now."""
    key = cache_key(what, *of, cpu_name(), runtime.version() or "", subject.provider)
    known = cache.get(key)
    if known is None:
        known = measure()
        cache.put(key, known)
    return float(known)


def _fastest(subject: Subject, feed: Feed) -> float:
    session = Session(subject.given, provider=subject.provider, threads=1)
    few = Feed(feed.samples.first(TIMED), feed.inputs, feed.state)
    least_s = math.inf
    before_s = time.perf_counter()
    for _ in few.run(session):
        after_s = time.perf_counter()
        least_s, before_s = min(least_s, after_s - before_s), after_s
    return least_s


def share_of_samples(sample_s: float, budget_s: float) -> float:
    """The share of the usual numbers of samples (`graphopt.parting`) that there is time for.

    Args:
        sample_s: what one takes; see `seconds_per_sample`.
        budget_s: that the search may take.
    """
    # What is searched by is also seen in a mirror.
    runs = FITTED_MAXIMUM + 2 * JUDGED_MAXIMUM
    return _halved(JUDGED_SHARE * budget_s / (runs * sample_s))


def glanced_samples(probes: int, sample_s: float, budget_s: float) -> int:
    """How many samples there is time for in each of many probes.

    Args:
        probes: how many there are.
        sample_s: what one sample takes.
        budget_s: that the search may take.
    """
    runs = max(probes, 1) * GLANCED_MAXIMUM
    return round(GLANCED_MAXIMUM * _halved(PROBED_SHARE * budget_s / (runs * sample_s)))


def _halved(affordable: float) -> float:
    """The largest of 1, 1/2, 1/4 … that is affordable."""
    if affordable >= 1:
        return 1.0
    return max(2.0 ** math.floor(math.log2(affordable)), SHARE_MINIMUM)
