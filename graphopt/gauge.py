"""How much a candidate of a search has lost, of the metric, as well as the samples can tell.

Few items tell little of a metric: of 30, one is three points. So what is known of each is used.
The regret of an item whose answer changed is what a calibrated original expects this to cost, and
its mean varies much less than that of labels; by labels, where there are any, the original is
calibrated. Where few items are, and none of their answers changed, what the divergence lets expect
counts as so many items more. And labels have the last word where they say for certain that it is
worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from graphopt.building import Built
from graphopt.certificate import paired_standard_error
from graphopt.runtime import Session
from graphopt.scores import Judge, Scores

DROP_PER_DIVERGENCE = 50.0
"""Points that classifiers lose for each nat of divergence: 12, 15, 45 and 60 were seen of four."""

EXPECTED_ITEMS = 70
"""What is expected counts as so many items: both are as uncertain then. Where one point is lost, it
may be half or twice that; so may the mean of 70 regrets, of which one in twenty is 20 points."""

CERTAIN = 2.0
"""So many standard errors. One is exceeded by one candidate of six that loses nothing, and a search
looks at ten."""


@dataclass(frozen=True)
class Gauged:
    """What a candidate has lost.

    Attributes:
        drop: the estimate, in the unit of the metric.
        measured: the drop of the metric on the items of the search.
        error: its paired standard error; infinite where it is not known.
    """

    drop: float
    measured: float
    error: float


@dataclass
class Gauge:
    """Estimates the drops of candidates.

    Attributes:
        original: scores of the original on the items of the search.
        judge: of the metric, there; None where the metric is the agreement that was built with.
        expects_regret: the metric is of answers, of which the regret of agreement foretells the
            drop.
        provider: "cpu" or "cuda".
        items: how many losses of agreement are seen on.
    """

    original: Scores
    judge: Judge | None
    expects_regret: bool
    provider: str
    items: int
    evaluations: int = 0
    _seen: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, built: Built, smooths: bool = True) -> Gauged:
        """What a candidate has lost.

        Args:
            built: the candidate.
            smooths: what others were found to lose counts, too, where only the metric tells.
        """
        self.evaluations += 1
        # Not less than what was seen: of many candidates, the lucky ones seem best.
        loss = max(built.loss, expected_drop(built.loss, built.likely_divergence, self.items))
        if self.judge is None:
            return Gauged(loss, built.loss, 0.0)
        scores = self.judge(Session(built.path, provider=self.provider))
        measured = self.original.value - scores.value
        error = _paired_error(self.original, scores)
        if self.expects_regret:
            return Gauged(max(loss, measured - CERTAIN * error), measured, error)
        self._seen.append((built.divergence, measured))
        if not smooths:
            return Gauged(measured, measured, error)
        # Outputs that are not finite say nothing but by the metric.
        smooth = self.per_divergence * built.divergence if math.isfinite(built.divergence) else 0.0
        sure = measured - CERTAIN * error if math.isfinite(error) else measured
        return Gauged(max(smooth, sure), measured, error)

    @property
    def per_divergence(self) -> float:
        """Drop for each unit of divergence, by least squares over all candidates; not below 0."""
        finite = [(d, drop) for d, drop in self._seen if math.isfinite(d) and math.isfinite(drop)]
        square = math.fsum(d * d for d, _ in finite)
        return max(math.fsum(d * drop for d, drop in finite) / square, 0.0) if square else 0.0


def expected_drop(loss: float, divergence: float, items: int) -> float:
    """Of a metric of answers, by the losses of few items and by what divergence lets expect.

    Args:
        loss: of agreement, the mean of the items.
        divergence: of outputs, likewise.
        items: how many there were.
    """
    if not math.isfinite(divergence):
        return loss
    expected = DROP_PER_DIVERGENCE * divergence
    return (items * loss + EXPECTED_ITEMS * expected) / (items + EXPECTED_ITEMS)


def _paired_error(original: Scores, other: Scores) -> float:
    if original.per_item is None or other.per_item is None:
        return float("inf")
    return paired_standard_error(original.per_item, other.per_item)
