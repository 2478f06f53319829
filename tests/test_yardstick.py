"""What candidates are measured by: the drop in the metric's unit, parts, and scores on each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tuned import DIGITS, classifier, images, vectors

from graphopt.accuracy import Accuracy
from graphopt.agreement import Agreement
from graphopt.errors import SpecError
from graphopt.runtime import Session
from graphopt.subject import open_subject
from graphopt.yardstick import AllowedDrop, Yardstick, measured_by, parse_allowed_drop


def of_classifier(count: int, drop: AllowedDrop) -> Yardstick:
    subject = open_subject(classifier(), "cpu", True, True, lambda _: None)
    feed = subject.feed(list(vectors(count)), None, ())
    return measured_by(subject, feed, Agreement(), False, drop, 0.05, seed=0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (1, AllowedDrop(1, False)),
        ("1.5", AllowedDrop(1.5, False)),
        ("2%", AllowedDrop(0.02, True)),
        (" .5 % ", AllowedDrop(0.005, True)),
        ("1e1%", AllowedDrop(0.1, True)),
    ],
)
def test_a_drop_is_of_the_metric_or_a_share_of_it(text: float | str, wanted: AllowedDrop) -> None:
    assert parse_allowed_drop(text) == wanted


@pytest.mark.parametrize("text", ["", "%", "-1", "-1%", "nan", "inf", "one", "2 % of it"])
def test_what_is_no_drop_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="max-drop is"):
        parse_allowed_drop(text)


def test_a_share_is_of_the_originals_value() -> None:
    assert AllowedDrop(0.02, True).of(-80) == pytest.approx(1.6)
    assert AllowedDrop(0.02, False).of(-80) == 0.02
    assert of_classifier(30, AllowedDrop(0.02, True)).limit == pytest.approx(2)


def test_each_part_has_its_own_scores_of_the_original() -> None:
    by = of_classifier(30, AllowedDrop(1, False))

    assert (by.metric, by.unit, by.limit) == ("agreement", "%", 1)
    assert by.parts.counts == (16, 8, 6)
    assert by.gauge.items == 24
    assert by.gauge.judge is None, "agreement is measured where models are built"
    assert by.verified.per_item is not None
    assert len(by.verified.per_item) == 6
    assert by.sureness is None


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_something_of_the_drop_is_left_to_luck(drop: float) -> None:
    assert of_classifier(20, AllowedDrop(drop, False)).aim == pytest.approx(0.95 * drop)


def test_labels_say_how_sure_the_original_may_be(tmp_path: Path) -> None:
    samples, session = images(60), Session(DIGITS)
    answers = [int(next(iter(session.run(one).values())).argmax()) for one in samples]
    labels = [(a + 1) % 10 if number % 4 == 0 else a for number, a in enumerate(answers)]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    subject = open_subject(DIGITS, "cpu", True, True, lambda _: None)
    feed = subject.feed(samples, None, ())

    accuracy = Accuracy(tmp_path / "labels.json")
    by = measured_by(subject, feed, accuracy, False, AllowedDrop(1, False), 0.05, seed=0)

    assert by.metric == "accuracy"
    assert by.gauge.judge is not None
    # Every fourth label is another answer; the samples to verify by are not among those counted.
    assert by.sureness == pytest.approx(0.75, abs=0.1)
