"""Metrics in text form."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.accuracy import Accuracy
from graphopt.agreement import Agreement
from graphopt.errors import SpecError
from graphopt.metric import parse_metric
from graphopt.user_metric import UserMetric


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    (tmp_path / "labels.json").write_text("[1]")
    (tmp_path / "a.npz").write_bytes(b"")
    return tmp_path


def test_labels_beside_the_samples_decide(labelled: Path, tmp_path: Path) -> None:
    (bare := tmp_path / "bare").mkdir()

    assert parse_metric(None, labelled) == Accuracy(labelled / "labels.json")
    assert parse_metric(None, labelled / "a.npz") == Accuracy(labelled / "labels.json")
    assert parse_metric(None, bare) == Agreement()
    assert parse_metric(None, None) == Agreement()
    assert parse_metric(None, bare, labelled / "labels.json") == Accuracy(labelled / "labels.json")


@pytest.mark.parametrize(
    "text", ["agreement", "accuracy", "accuracy+1", "accuracy:out:0", "a b.py:f"]
)
def test_the_name_is_what_was_written(labelled: Path, text: str) -> None:
    assert parse_metric(text, labelled).name == text


def test_each_form(labelled: Path) -> None:
    labels = labelled / "labels.json"

    assert parse_metric("agreement", labelled) == Agreement()
    assert parse_metric("accuracy:out:0", labelled) == Accuracy(labels, "out:0")
    assert parse_metric("accuracy+1:y", labelled) == Accuracy(labels, "y", background=True)
    assert parse_metric("dir/mine.py:score", labelled) == UserMetric(Path("dir/mine.py"), "score")


@pytest.mark.parametrize(
    "text, said",
    [
        ("acuracy", r"no metric 'acuracy'; did you mean 'accuracy'\?"),
        ("agrement", r"did you mean 'agreement'\?"),
        ("f1", r"there is agreement, accuracy\[\+1\]\[:OUTPUT\], FILE\.py:FUNCTION"),
        ("", "no metric ''"),
        ("accuracy:", "no metric 'accuracy:'"),
        ("agreement:y", "no metric 'agreement:y'"),
        ("mine.py", "names no function; write mine.py:FUNCTION"),
        ("mine.py:", "no metric 'mine.py:'"),
        ("mine.txt:f", "no metric 'mine.txt:f'"),
    ],
)
def test_other_text_is_refused(labelled: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_metric(text, labelled)


def test_accuracy_needs_labels(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no labels\.json in .*--metric agreement"):
        parse_metric("accuracy", tmp_path)
    with pytest.raises(SpecError, match=r"no labels\.json beside the samples"):
        parse_metric("accuracy", None)
