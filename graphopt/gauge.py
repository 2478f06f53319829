"""How much a candidate of a search has lost, of the metric, as well as the samples can tell.

Few items tell little of a metric: of 30, one is three points. So what is known of each is used.
The regret of an item whose answer changed is what a calibrated original expects this to cost, and
its mean varies much less than that of labels; by labels, where there are any, the original is
calibrated. And they have the last word where they say, beyond their standard error, that it is
worse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from graphopt.building import Built
from graphopt.certificate import paired_standard_error
from graphopt.runtime import Session
from graphopt.scores import Judge, Scores


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
    """

    original: Scores
    judge: Judge | None
    expects_regret: bool
    provider: str
    evaluations: int = 0
    _seen: list[tuple[float, float]] = field(default_factory=list)

    @property
    def learns(self) -> bool:
        """What it says of a candidate depends on those before."""
        return self.judge is not None and not self.expects_regret

    def __call__(self, built: Built) -> Gauged:
        """What a candidate has lost."""
        self.evaluations += 1
        if self.judge is None:
            return Gauged(built.loss, built.loss, 0.0)
        scores = self.judge(Session(built.path, provider=self.provider))
        measured = self.original.value - scores.value
        error = _paired_error(self.original, scores)
        if self.expects_regret:
            return Gauged(max(built.loss, measured - error), measured, error)
        self._seen.append((built.divergence, measured))
        # Outputs that are not finite say nothing but by the metric.
        smooth = self.per_divergence * built.divergence if np.isfinite(built.divergence) else 0.0
        return Gauged(
            max(smooth, measured - error if np.isfinite(error) else measured), measured, error
        )

    @property
    def per_divergence(self) -> float:
        """Drop for each unit of divergence, by least squares over all candidates; not below 0."""
        divergences, drops = (np.array(column) for column in zip(*self._seen, strict=True))
        finite = np.isfinite(divergences)
        square = float((divergences[finite] ** 2).sum())
        return max(float((divergences * drops)[finite].sum()) / square, 0.0) if square else 0.0


def _paired_error(original: Scores, other: Scores) -> float:
    if original.per_item is None or other.per_item is None:
        return float("inf")
    return paired_standard_error(original.per_item, other.per_item)


def score(judge: Judge, path: Path, provider: str) -> Scores:
    """The scores of the model in a file."""
    return judge(Session(path, provider=provider))
