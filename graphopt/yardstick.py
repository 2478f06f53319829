"""What the candidates of a search are measured by: a metric, the original's, and parted samples."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from graphopt.accuracy import Accuracy
from graphopt.agreement import Agreement
from graphopt.errors import SpecError
from graphopt.gauge import Gauge
from graphopt.parting import Parts, items_to_prove, part
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.scores import Judge, Metric, Scores
from graphopt.search import Search
from graphopt.subject import Subject
from graphopt.verifying import Verifier, range_of_drops

_RELATIVE = re.compile(r"(?P<share>\d*\.?\d+(?:[eE][+-]?\d+)?)\s*%")

AIM = 0.95
"""Of the drop that is allowed. Of 14 candidates near the limit, on 384 items, estimates were .2 of
a point above the truth, and varied by .3 about that."""


@dataclass(frozen=True)
class AllowedDrop:
    """The drop of a metric that a user allows.

    Attributes:
        amount: in the unit of the metric, or a share.
        is_share: the amount is a share of the original's value.
    """

    amount: float
    is_share: bool

    def of(self, original: float) -> float:
        """In the unit of the metric, of which the original has this value."""
        return self.amount * abs(original) if self.is_share else self.amount


def parse_allowed_drop(text: float | str) -> AllowedDrop:
    """The drop that is meant by a number, or by a text such as "2%".

    Raises:
        SpecError: it is no number, negative or not finite.
    """
    match = _RELATIVE.fullmatch(text.strip()) if isinstance(text, str) else None
    try:
        amount = float(match["share"]) / 100 if match else float(text)
    except ValueError:
        amount = math.nan
    if not (amount >= 0 and math.isfinite(amount)):
        raise SpecError(
            f"max-drop is {text!r}; it must be a number in the unit of the metric, as 1.0, or "
            "a share of the original's value, as 2%"
        )
    return AllowedDrop(amount, match is not None)


@dataclass(frozen=True)
class Yardstick:
    """What candidates are measured by.

    Attributes:
        metric: by its name.
        unit: of the metric, "%" or empty.
        limit: the drop that is allowed, in this unit.
        delta: the chance of error of what is said of the drop.
        items_needed: to verify by, so many at least prove the limit; None where no number does.
        parts: of the samples.
        gauge: estimates drops, on the samples of the search.
        judge: gives the metric on the samples to verify by.
        verified: scores of the original there.
        sureness: how often the original is right, where labels say it; see `graphopt.agreement`.
        agreement: gives the agreement with the original on the samples to verify by, where that
            foretells the drop; else None.
    """

    metric: str
    unit: str
    limit: float
    delta: float
    items_needed: int | None
    parts: Parts
    gauge: Gauge
    judge: Judge
    verified: Scores
    sureness: float | None
    agreement: Judge | None

    @property
    def aim(self) -> float:
        """What a search aims at: it takes what seems best of many, which is luck in part."""
        return AIM * self.limit

    def verifier(self, search: Search) -> Verifier:
        """What looks at the candidates of a search on the samples that it never saw."""
        independent = not self.parts.shared
        return Verifier(
            search,
            self.judge,
            self.verified,
            self.limit,
            self.delta,
            self.items_needed,
            independent,
            self.agreement,
            self.gauge.items,
        )


def measured_by(
    subject: Subject,
    feed: Feed,
    metric: Metric,
    suits: bool,
    drop: AllowedDrop,
    delta: float,
    seed: int,
    share: float = 1.0,
) -> Yardstick:
    """Run the original on all samples, part these, and see what it has on each part.

    Args:
        subject: the model as it was given.
        feed: all samples.
        metric: as it was asked for, or found by what lies beside the samples.
        suits: nobody asked for the metric: it is to suit the model.
        drop: that is allowed.
        delta: the chance of error of what is said of it.
        seed: of another parting.
        share: see `graphopt.parting.part`.

    Raises:
        GraphoptError: the metric does not fit the model or the samples.
    """
    model, session = subject.source.model, Session(subject.given, provider=subject.provider)
    if suits and isinstance(metric, Accuracy):
        metric = metric.suited(model, session, feed)
    (whole,) = metric.judges(model, session, feed, [feed])
    original = whole(session)
    limit = drop.of(original.value)
    items_needed = items_to_prove(limit, delta, *range_of_drops(original))
    parts = part(feed, items_needed, seed, share)
    searched, verified, known = metric.judges(
        model, session, feed, [parts.judged, parts.verified, parts.searched]
    )
    gauge = Gauge(
        searched(session),
        None if isinstance(metric, Agreement) else searched,
        isinstance(metric, Accuracy),
        subject.provider,
        len(parts.searched.samples.sequences),
    )
    sureness = _sureness(known(session)) if isinstance(metric, Accuracy) else None
    agreement = verified if isinstance(metric, Agreement) else None
    if isinstance(metric, Accuracy):
        _, agreement = Agreement(sureness).judges(
            model, session, feed, [parts.judged, parts.verified]
        )
    return Yardstick(
        metric=metric.name,
        unit=original.unit,
        limit=limit,
        delta=delta,
        items_needed=items_needed,
        parts=parts,
        gauge=gauge,
        judge=verified,
        verified=verified(session),
        sureness=sureness,
        agreement=agreement,
    )


def _sureness(scores: Scores) -> float:
    """How often the original is right, by Laplace's rule: a few items that are say little."""
    assert scores.per_item is not None
    right = float((scores.per_item > 0).sum())
    return (right + 1) / (len(scores.per_item) + 2)
