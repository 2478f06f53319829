"""How many samples a search can afford, by how long the original takes for one.

Numbers of samples are halved until they fit, so that they are the same wherever a sample takes
about as long. And that is measured once and kept: a search that goes on has the same samples.
"""

from __future__ import annotations

import math
import time

from graphopt import runtime
from graphopt.benchmark import cpu_name
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
    machine = cpu_name(), runtime.version() or "", subject.provider
    key = cache_key("seconds", subject.source.sha256(), feed.samples.digests[0], *machine)
    known = cache.get(key)
    if known is None:
        known = _fastest(subject, feed)
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
