"""What a candidate is said to have lost."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tuned import written

from graphopt.building import Built
from graphopt.gauge import Gauge
from graphopt.runtime import Session
from graphopt.scores import Judge, Scores


def built(path: Path, loss: float = 2.0, divergence: float = 0.01) -> Built:
    return Built(path, "", (), 1000, divergence, divergence, loss, 0.02)


def scored(per_item: list[float]) -> Scores:
    array = np.array(per_item)
    return Scores(float(array.mean()), array, 0.0, 100.0, "%")


def always(*scores: Scores) -> Judge:
    rest = iter(scores)
    return lambda session: next(rest)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path / "model.onnx")


def test_agreement_is_what_the_build_found(path: Path) -> None:
    gauge = Gauge(scored([100, 100]), None, False, "cpu", 100)

    found = gauge(built(path))

    assert (found.drop, found.measured, found.error) == (2.0, 2.0, 0.0)
    assert gauge.evaluations == 1


def test_by_labels_the_regret_counts_unless_they_say_more(path: Path) -> None:
    original = scored([100.0] * 90 + [0.0] * 10)
    better, worse = scored([100.0] * 92 + [0.0] * 8), scored([100.0] * 70 + [0.0] * 30)
    gauge = Gauge(original, always(better, worse), True, "cpu", 100)

    assert gauge(built(path)).drop == 2.0
    found = gauge(built(path))
    assert found.measured == pytest.approx(20)
    assert found.drop == pytest.approx(20 - 2 * found.error)
    assert 2 < found.error < 6


def test_what_few_items_do_not_show_the_divergence_lets_expect(path: Path) -> None:
    few, many = (Gauge(scored([100, 100]), None, False, "cpu", items) for items in (10, 1000))
    quiet = built(path, loss=0.0, divergence=0.04)

    # 2 points are expected of it, which count as 70 items.
    assert few(quiet).drop == pytest.approx(2 * 70 / 80)
    assert many(quiet).drop == pytest.approx(2 * 70 / 1070)
    assert few(built(path, loss=3.0, divergence=0.04)).drop == 3.0


def test_what_others_lost_counts_only_where_it_is_asked_for(path: Path) -> None:
    original, same = scored([100.0] * 20), scored([100.0] * 20)
    gauge = Gauge(original, always(scored([90.0] * 20), same, same), False, "cpu", 20)
    gauge(built(path, divergence=1.0))

    assert gauge(built(path, divergence=0.1), smooths=False).drop == 0
    assert gauge(built(path, divergence=0.1)).drop > 0.5


def test_a_metric_of_one_number_is_taken_at_its_word(path: Path) -> None:
    original = Scores(0.9, None, -math.inf, math.inf, "")
    gauge = Gauge(original, always(Scores(0.7, None, -math.inf, math.inf, "")), False, "cpu", 100)

    found = gauge(built(path))

    assert found.drop == pytest.approx(0.2)
    assert found.error == math.inf


def test_of_another_metric_the_divergence_foretells_what_items_do_not_show(path: Path) -> None:
    original, same = scored([100.0] * 20), scored([100.0] * 20)
    worse = scored([100.0] * 10 + [80.0] * 10)
    gauge = Gauge(original, always(worse, same), False, "cpu", 100)

    first = gauge(built(path, divergence=1.0))
    second = gauge(built(path, divergence=0.1))

    assert first.measured == pytest.approx(10)
    assert second.measured == 0
    assert 0.9 < second.drop <= 1.0


@pytest.mark.parametrize("divergence", [math.inf, math.nan])
def test_outputs_that_cannot_be_compared_teach_nothing(path: Path, divergence: float) -> None:
    original, other = scored([100.0] * 4), scored([50.0] * 4)
    gauge = Gauge(original, always(other, original), False, "cpu", 100)

    assert gauge(built(path, divergence=divergence)).drop >= 50
    assert gauge(built(path, divergence=0.1)).drop == 0


def test_the_judge_runs_the_model(path: Path) -> None:
    seen: list[Session] = []

    def judge(session: Session) -> Scores:
        seen.append(session)
        return scored([1.0, 1.0])

    Gauge(scored([1.0, 1.0]), judge, True, "cpu", 100)(built(path))

    assert list(seen[0].inputs) == ["x"]
