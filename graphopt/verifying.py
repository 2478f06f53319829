"""What samples that a search never saw say of its result.

A candidate is chosen by other samples, so that a bound on its drop by these holds as it stands.
Where these show it to be worse than it should be, or all samples together do, the next one is
taken; each look has half of the chance of error of the one before, so that all of them together
have no more than was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graphopt.building import Built
from graphopt.candidates import Candidate
from graphopt.certificate import certified_prefix, paired_standard_error, upper_bound
from graphopt.errors import SampleError
from graphopt.gauge import CERTAIN, expected_drop
from graphopt.runtime import Session
from graphopt.scores import Judge, Scores, drops
from graphopt.search import Search


@dataclass(frozen=True)
class Certificate:
    """What samples that the search never saw say of the result.

    Attributes:
        limit: the drop that was allowed, in the unit of the metric.
        original: the metric of the original on them.
        value: the metric of the result.
        drop: the one less the other.
        error: paired standard error of the drop; infinite where it is not known.
        bound: the drop is at most this, at the confidence; None where nothing can be proven.
        confidence: of the bound.
        items: how many there were.
        items_needed: so many at least prove the limit; None where no number does.
        reason: why it is not certified, or None.
    """

    limit: float
    original: float
    value: float
    drop: float
    error: float
    bound: float | None
    confidence: float
    items: int
    items_needed: int | None
    reason: str | None

    @property
    def certified(self) -> bool:
        """The drop is within the limit, at the confidence."""
        return self.bound is not None and self.bound <= self.limit


@dataclass(frozen=True)
class Taken:
    """A candidate as it is delivered.

    Attributes:
        candidate: as the search had it.
        built: fitted on all samples of the search.
    """

    candidate: Candidate
    built: Built


@dataclass
class Verifier:
    """Looks at candidates on samples that the search never saw.

    Attributes:
        search: that found them.
        judge: gives the metric on these samples.
        original: scores of the original there.
        limit: the drop that is allowed.
        delta: chance of error.
        items_needed: so many at least prove the limit; None where no number does.
        independent: the search never saw these samples.
        agreement: gives the agreement with the original on these samples, where it foretells the
            drop; else None. May be the judge.
        items_searched: how many the search estimated drops by.
    """

    search: Search
    judge: Judge
    original: Scores
    limit: float
    delta: float
    items_needed: int | None
    independent: bool
    agreement: Judge | None = None
    items_searched: int = 0
    evaluations: int = 0

    def by_estimate(self) -> tuple[Taken | None, Certificate]:
        """The best candidate, unless these samples show that it is worse than it should be."""
        delta = self.delta
        while (candidate := self.search.next_best()) is not None:
            delta /= 2
            taken = Taken(candidate, self.search.refitted(candidate))
            scores = self._scores(taken.built.path)
            found = self._certificate(scores, delta)
            drop = max(self._least(found), self._together(taken, scores, found))
            if drop <= self.limit:
                return taken, found
            self.search.notes.append(
                f"not taken: {taken.built.stored_bytes:,} bytes, made of {candidate.trunk}; with "
                f"the samples kept back, the drop is about {drop:.3g}"
            )
            self.search.reject(candidate, drop)
        return None, self._certificate(self.original, delta)

    def _least(self, found: Certificate) -> float:
        """What the drop is for certain; of labels, where agreement foretells what they say."""
        if not math.isfinite(found.error):
            return found.drop
        labels = self.agreement is not None and self.agreement is not self.judge
        return found.drop - found.error * (CERTAIN if labels else 1.0)

    def _together(self, taken: Taken, scores: Scores, found: Certificate) -> float:
        """The drop that these items and those of the search tell, each as much as they are.

        Of few items hardly one has another answer, and the search chose by those that it had: how
        far the outputs of others are from the original's says more.
        """
        drop = found.drop
        if self.agreement is not None:
            agreed = scores
            if self.agreement is not self.judge:
                agreed = self.agreement(self._session(taken.built.path))
            divergence = math.nan if agreed.divergence is None else agreed.divergence
            drop = expected_drop(agreed.high - agreed.value, divergence, found.items)
        items = found.items + self.items_searched
        searched = self.items_searched * taken.candidate.gauged.drop
        return (searched + found.items * drop) / items if items else drop

    def by_proof(self) -> tuple[Taken | None, Certificate]:
        """The best candidate that is proven to be within the drop, with all that are milder.

        They are looked at from the mildest to the boldest, as the search has them, until one fails
        (Learn then Test, arXiv 2110.01052).
        """
        fit = self.search.within
        order: list[Candidate] = []
        for one in sorted(fit, key=lambda one: one.gauged.drop):
            # A bolder one that is no better can only end the proof.
            if not order or fit.index(one) < fit.index(order[-1]):
                order.append(one)
        seen: list[Scores] = []

        def values() -> Iterator[object]:
            for one in order:
                seen.append(self._scores(one.built.path))
                yield drops(self.original, seen[-1]).values

        low, high = range_of_drops(self.original)
        count = 0
        if math.isfinite(high) and self.independent:
            count = certified_prefix(values(), self.limit, self.delta, low, high)  # type: ignore[arg-type]
        if not count:
            return None, self._certificate(self.original, self.delta)
        best = min(range(count), key=lambda at: fit.index(order[at]))
        return Taken(order[best], order[best].built), self._certificate(seen[best], self.delta)

    def _scores(self, path: Path) -> Scores:
        self.evaluations += 1
        return self.judge(self._session(path))

    def _session(self, path: Path) -> Session:
        return Session(path, provider=self.search.subject.provider)

    def _certificate(self, scores: Scores, delta: float) -> Certificate:
        error, bound, reason = math.inf, None, None
        items = len(self.original.per_item) if self.original.per_item is not None else 0
        if self.original.per_item is not None and scores.per_item is not None:
            error = paired_standard_error(self.original.per_item, scores.per_item)
        try:
            found = drops(self.original, scores)
            bound = upper_bound(found.values, found.lower, found.upper, delta)
        except SampleError as cause:
            reason = str(cause)
        if not self.independent:
            bound, reason = None, "there are too few samples to keep some of them from the search"
        elif bound is not None and bound > self.limit:
            reason = self._why_not_proven(bound, items)
        return Certificate(
            limit=self.limit,
            original=self.original.value,
            value=scores.value,
            drop=self.original.value - scores.value,
            error=error,
            bound=bound,
            confidence=1 - delta,
            items=items,
            items_needed=self.items_needed,
            reason=reason,
        )

    def _why_not_proven(self, bound: float, items: int) -> str:
        if self.items_needed is None:
            return f"no number of samples proves a drop of at most {self.limit:g}"
        if items < self.items_needed:
            return (
                f"{items} samples cannot prove a drop of at most {self.limit:g}: at least "
                f"{self.items_needed} that the search does not see are needed, twice that in all"
            )
        return f"the samples prove a drop of at most {bound:.3g}, and no less"


def range_of_drops(original: Scores) -> tuple[float, float]:
    """The least and the largest drop that there can be; infinite where that is not known."""
    high = original.high - original.low
    return (0.0 if original.below_original else -high), high
