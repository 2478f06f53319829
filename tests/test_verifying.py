"""What is said of the drop of a result holds as often as it is said to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom
from tuned import DIGITS, IMAGES, trial_in

from graphopt.building import Built
from graphopt.candidates import Candidate
from graphopt.gauge import Gauged
from graphopt.runtime import Session
from graphopt.scores import Judge, Scores
from graphopt.trial import open_trial
from graphopt.verifying import Certificate, Taken, Verifier, range_of_drops

COUNTS = (16, 6, 4, 3, 2)
"""Clusters for all layers: from hardly any loss to a large one."""

DRAWS = 400
DELTA = 0.1


@cache
def population() -> dict[str, np.ndarray]:
    """Scores of each of 150 images by models that were really built, by their names.

    What is drawn from these, with replacement, has a mean that is known.
    """
    trial = open_trial(trial_in(Path(mkdtemp()) / "trial", DIGITS, samples=IMAGES))
    found = {}
    for count in COUNTS:
        each = ",".join(
            f"{name}:{count}"
            for name, value in trial.base.graph.initializers.items()
            if value.shape is not None and value.shape.rank() > 1
        )
        model, _ = trial.rewritten(f"cluster-weights{{each=({each})}}")
        per_item = trial.scores(model).per_item
        assert per_item is not None
        found[str(count)] = per_item
    return found


def scored(per_item: np.ndarray) -> Scores:
    return Scores(float(per_item.mean()), per_item, 0.0, 100.0, "%", below_original=True)


def candidate(name: str, drop: float) -> Candidate:
    built = Built(Path(name), name, (), 1000 * int(name), 0.0, 0.0, drop, None)
    return Candidate("float", built, Gauged(drop, drop, 0.0), {"w": name}, "")


@dataclass
class OnScores(Verifier):
    """Looks at scores that are known, instead of running models."""

    known: Mapping[str, np.ndarray] = field(default_factory=dict)

    def _scores(self, path: Path) -> Scores:
        self.evaluations += 1
        return scored(self.known[path.name])

    def _session(self, path: Path) -> Session:
        return path.name  # type: ignore[return-value]


def verifier(
    known: Mapping[str, np.ndarray],
    limit: float,
    fit: Sequence[Candidate] = (),
    delta: float = DELTA,
) -> OnScores:
    """Of a search that found candidates, the best first."""
    left = list(fit)
    search: Any = SimpleNamespace(
        refitted=lambda one: one.built,
        within=left,
        notes=[],
        next_best=lambda: next(iter(left), None),
        reject=lambda one, drop: left.remove(one),
    )
    count = len(next(iter(known.values())))
    original = scored(np.full(count, 100.0))
    return OnScores(search, lambda _: original, original, limit, delta, None, True, known=known)


Verdict = tuple[Taken | None, Certificate]
Verify = Callable[[Verifier], Verdict]


def drawn(limit: float, verify: Verify, items: int = 60) -> list[tuple[float, Certificate]]:
    """The true drop of what was taken, and what was said of it, in many searches.

    Candidates are chosen by other items than those that verify.
    """
    truth, found = population(), []
    size = len(next(iter(truth.values())))
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        searched, verified = rng.integers(0, size, (2, items))
        drops = {name: 100 - float(scores[searched].mean()) for name, scores in truth.items()}
        fit = [candidate(name, drop) for name, drop in drops.items() if drop <= limit]
        known = {name: scores[verified] for name, scores in truth.items()}
        taken, certificate = verify(verifier(known, limit, fit[::-1]))
        if taken is not None:
            found.append((100 - float(truth[taken.built.passes].mean()), certificate))
    return found


@pytest.mark.parametrize("limit", [2.0, 8.0, 25.0])
def test_the_bound_is_broken_no_more_often_than_its_confidence_allows(limit: float) -> None:
    found = drawn(limit, Verifier.by_estimate)

    broken = sum(one.bound is not None and drop > one.bound for drop, one in found)
    assert len(found) > DRAWS / 2
    assert all(one.confidence >= 1 - DELTA for _, one in found)
    assert broken <= binom.ppf(1 - 1e-6, len(found), DELTA)


@pytest.mark.parametrize("limit", [8.0, 25.0])
def test_what_is_proven_is_wrong_no_more_often_than_allowed(limit: float) -> None:
    found = drawn(limit, Verifier.by_proof)

    assert all(one.certified for _, one in found)
    wrong = sum(drop > limit for drop, _ in found)
    assert wrong <= binom.ppf(1 - 1e-6, DRAWS, DELTA)


def test_a_bound_that_does_not_hold_is_found_out() -> None:
    """What the tests above would say of the drop as it was measured."""
    found = drawn(8.0, Verifier.by_estimate)

    broken = sum(drop > one.drop for drop, one in found)

    assert broken > binom.ppf(1 - 1e-6, len(found), DELTA)


def test_what_the_items_show_to_be_worse_is_not_taken() -> None:
    known = {"2": np.full(40, 60.0), "4": np.full(40, 99.0)}
    one = verifier(known, 2.0, [candidate("2", 1.0), candidate("4", 0.5)])

    taken, certificate = one.by_estimate()

    assert taken is not None and taken.built.passes == "4"
    assert certificate.drop == pytest.approx(1.0)
    # The second look has a quarter of the chance of error, so that all have no more than it.
    assert certificate.confidence == pytest.approx(1 - DELTA / 4)
    assert one.evaluations == 2


@pytest.mark.parametrize(
    ("drop_searched", "divergence", "taken"), [(0.5, 0.2, "4"), (0.5, 0.005, "2"), (1.9, 0.06, "4")]
)
def test_what_all_items_together_show_to_be_worse_is_not_taken(
    drop_searched: float, divergence: float, taken: str
) -> None:
    """Of few items none has another answer, but how far their outputs are says that others have."""
    known = {"2": np.full(10, 100.0), "4": np.full(10, 100.0)}
    one = verifier(known, 2.0, [candidate("2", drop_searched), candidate("4", 0.1)])
    seen = {"2": divergence, "4": 0.0}
    one.agreement = lambda path: replace(  # type: ignore[assignment]
        scored(np.full(10, 100.0)), divergences=np.full(10, seen[str(path)])
    )
    one.items_searched = 20

    found, _ = one.by_estimate()

    assert found is not None and found.built.passes == taken


def test_of_a_metric_of_its_own_all_items_tell_the_drop() -> None:
    known = {"2": np.tile([90.0, 98.0], 8), "4": np.full(16, 99.0)}
    one = verifier(known, 4.0, [candidate("2", 3.5), candidate("4", 0.5)])
    one.items_searched = 16

    found, certificate = one.by_estimate()

    # 6 of these items and 3.5 of those of the search are over 4; 6 less its error of 1 is, too.
    assert found is not None and found.built.passes == "4"
    assert certificate.drop == pytest.approx(1.0)
    assert one.search.notes == [
        "not taken: 2,000 bytes, made of float; with the samples kept back, the drop is about 4.97"
    ]


def test_where_all_are_worse_none_is_taken() -> None:
    one = verifier({"2": np.full(40, 60.0)}, 2.0, [candidate("2", 1.0)])

    taken, certificate = one.by_estimate()

    assert taken is None
    assert certificate.drop == 0
    assert verifier({"2": np.full(40, 60.0)}, 2.0).by_estimate()[0] is None


@pytest.mark.parametrize(
    ("best_first", "bad", "taken", "evaluations"),
    [
        pytest.param("4 6 16", "4", "6", 3, id="it ends at the first that fails"),
        pytest.param("4 16 6", "6", "4", 2, id="but not at what is bolder and no better"),
    ],
)
def test_a_proof_takes_the_best_before_it_ends(
    best_first: str, bad: str, taken: str, evaluations: int
) -> None:
    expected = {"16": 0.0, "6": 1.0, "4": 2.0}
    known = {name: np.full(400, 60.0 if name == bad else 99.9) for name in expected}
    one = verifier(known, 5.0, [candidate(name, expected[name]) for name in best_first.split()])

    found, certificate = one.by_proof()

    assert found is not None and found.built.passes == taken
    assert certificate.certified
    assert certificate.bound is not None and certificate.bound <= 5.0
    assert one.evaluations == evaluations


def test_where_agreement_foretells_the_drop_few_labels_do_not_speak_against_it() -> None:
    """2 of 20 labels are lost: 10 points with an error of 7, and outputs are the same."""
    known = {"2": np.array([0.0, 0.0] + [100.0] * 18), "4": np.full(20, 100.0)}

    def taken(agreement: Judge | None) -> str:
        one = verifier(known, 2.0, [candidate("2", 0.5), candidate("4", 0.1)])
        one.agreement, one.items_searched = agreement, 1000
        found, _ = one.by_estimate()
        assert found is not None
        return found.built.passes

    same = replace(scored(np.full(20, 100.0)), divergences=np.zeros(20))
    assert (taken(lambda _: same), taken(None)) == ("2", "4")


def test_items_that_the_search_saw_prove_nothing() -> None:
    one = verifier({"6": np.full(400, 100.0)}, 5.0, [candidate("6", 0.0)])
    one.independent = False

    assert one.by_proof()[0] is None
    taken, certificate = one.by_estimate()

    assert taken is not None
    assert certificate.bound is None
    assert not certificate.certified
    assert "too few samples" in (certificate.reason or "")


def test_a_metric_of_one_number_is_measured_and_not_proven() -> None:
    one = verifier({"6": np.full(40, 99.0)}, 5.0, [candidate("6", 0.0)])
    one.original = Scores(100.0, None, -math.inf, math.inf, "")

    taken, certificate = one.by_estimate()

    assert taken is not None
    assert (certificate.drop, certificate.error, certificate.bound) == (1.0, math.inf, None)
    assert "one number for all items" in (certificate.reason or "")
    assert one.by_proof()[0] is None


def test_drops_of_agreement_are_never_below_nothing() -> None:
    assert range_of_drops(scored(np.ones(2))) == (0.0, 100.0)
    assert range_of_drops(Scores(0.5, None, 0.0, 1.0, "")) == (-1.0, 1.0)
