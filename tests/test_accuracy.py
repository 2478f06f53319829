"""How often a model is right, and what is said of labels that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphopt.accuracy import Accuracy, labels_of
from graphopt.errors import SampleError
from graphopt.recording import Feed
from graphopt.runtime import Session
from graphopt.samples import read_samples
from graphopt.scores import Judge, drops
from graphopt.signature import signature
from graphopt.testing import parse

IDENTITY = "g (float[N, 3] x) => (float[N, 3] y) {y = Identity(x)}"
NEGATED = "g (float[N, 3] x) => (float[N, 3] y) {y = Neg(x)}"
ROWS = ([9, 1, 2], [0, 5, 2], [0, 1, 3], [7, 6, 5])
"""Of which the answers are 0, 1, 2, 0."""


def _folder(tmp_path: Path, labels: object, rows: object = ROWS) -> Path:
    for n, row in enumerate(np.atleast_2d(np.array(rows, np.float32))):
        np.savez(tmp_path / f"s{n}.npz", x=row[None])
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    return tmp_path


def _judge(folder: Path, text: str = IDENTITY, output: str | None = None, **more: bool) -> Judge:
    model = parse(text)
    feed = Feed(read_samples(folder, signature(model)), signature(model))
    metric = Accuracy(folder / "labels.json", output, **more)
    (judge,) = metric.judges(model, Session(model), feed, [feed])
    return judge


@pytest.mark.parametrize("labels", [[0, 1, 2, 2], {"s0": 0, "s1": 1, "s2": 2, "s3": 2, "z": 9}])
def test_hits_are_counted(tmp_path: Path, labels: object) -> None:
    judge = _judge(_folder(tmp_path, labels))

    scores, negated = judge(Session(parse(IDENTITY))), judge(Session(parse(NEGATED)))

    assert scores.per_item is not None
    assert list(scores.per_item) == [100, 100, 100, 0]
    assert (scores.value, scores.low, scores.high, scores.unit) == (75, 0, 100, "%")
    found = drops(scores, negated)
    assert list(found.values) == [100, 100, 100, -100]
    assert (found.lower, found.upper) == (-100, 100)


def test_labels_go_with_their_samples_into_parts(tmp_path: Path) -> None:
    model = parse(IDENTITY)
    feed = Feed(read_samples(_folder(tmp_path, [0, 1, 2, 2]), signature(model)), signature(model))
    parts = [Feed(feed.samples.select(w), feed.inputs) for w in ([3], [2, 0])]

    judges = Accuracy(tmp_path / "labels.json").judges(model, Session(model), feed, parts)

    assert [judge(Session(model)).value for judge in judges] == [0, 100]


def test_classes_may_lie_before_axes_of_one(tmp_path: Path) -> None:
    text = """g (float[N, 3] x) => (float[N, 3, 1, 1] y) <int64[2] axes = {2, 3}> {
        a = Softmax(x) y = Unsqueeze(a, axes)
    }"""
    judge = _judge(_folder(tmp_path, [0, 1, 2, 2]), text)

    assert judge(Session(parse(text))).value == 75


def test_integers_answer_too(tmp_path: Path) -> None:
    text = "g (float[N, 3] x) => (uint8[N, 3] y) {y = Cast <to = 2> (x)}"

    assert _judge(_folder(tmp_path, [0, 1, 2, 0]), text)(Session(parse(text))).value == 100


def test_a_sample_of_several_rows_has_several_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array(ROWS[:2], np.float32))
    np.savez(tmp_path / "b.npz", x=np.array(ROWS[2:], np.float32))
    (tmp_path / "labels.json").write_text("[[0, 2], [2, 0]]")

    scores = _judge(tmp_path)(Session(parse(IDENTITY)))

    assert scores.per_item is not None
    assert list(scores.per_item) == [50, 100]


def test_nan_is_no_answer(tmp_path: Path) -> None:
    root = "g (float[N, 3] x) => (float[N, 3] y) {a = Neg(x) y = Sqrt(a)}"

    assert _judge(_folder(tmp_path, [0, 0, 0, 0]))(Session(parse(root))).value == 0


def test_a_background_class_is_found_out_and_then_left_out(tmp_path: Path) -> None:
    text = """g (float[N, 3] x) => (float[N, 4] y)
    <int64[4] pads = {0, 1, 0, 0}, float low = {-9}> {
        y = Pad (x, pads, low)
    }"""
    folder = _folder(tmp_path, [0, 1, 2, 0])

    with pytest.raises(SampleError, match=r"0\.0 %, and of 100\.0 % .* --metric accuracy\+1"):
        _judge(folder, text)
    assert _judge(folder, text, background=True)(Session(parse(text))).value == 100


# ------------------------------------------------------------------ which output


TWO = "g (float[N, 3] x) => (float[N, 3] y, float[N, 3] z) {y = Identity(x) z = Neg(x)}"


def test_one_of_several_outputs_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, [0, 1, 2, 0])

    with pytest.raises(SampleError, match=r"there are 2: 'y', 'z'; name one .*accuracy:OUTPUT"):
        _judge(folder, TWO)
    with pytest.raises(SampleError, match=r"no output 'yy'; did you mean 'y'\?"):
        _judge(folder, TWO, "yy")
    assert _judge(folder, TWO, "y")(Session(parse(TWO))).value == 100
    assert _judge(folder, TWO, "z")(Session(parse(TWO))).value == 0


def test_an_output_without_classes_cannot_answer(tmp_path: Path) -> None:
    folder = _folder(tmp_path, [0, 1, 2, 0])
    scores = "g (float[N, 3] x) => (float[N, 3] y) {y = Sigmoid(x)}"

    with pytest.raises(SampleError, match=r"there is none: 'y' is none \(each of its numbers"):
        _judge(folder, scores)
    assert _judge(folder, scores, "y")(Session(parse(scores))).value == 100
    flat = "g (float[N, 3] x) => (float[N] y) {y = ReduceMax <axes = [1], keepdims = 0> (x)}"
    flat = '<ir_version: 8, opset_import: ["" : 13]>' + flat
    with pytest.raises(SampleError, match=r"'y' has shape \[1\]"):
        _judge(folder, flat)


# ------------------------------------------------------------------ labels that do not fit


@pytest.mark.parametrize(
    "labels, said",
    [
        ([0, 1, 2], "has 3 labels, and there are 4 samples"),
        ([], "has 0 labels, and there are 4 samples"),
        ({"s0": 0, "s1": 1, "S2": 2}, r"2 of 4 samples have no label, the first of them 's2'"),
        ([0, 1, 2, 3], r"'s3' has the label 3, and output 'y' has 3 classes, 0 to 2"),
        ([0, 1, 2, -1], "'s3' has the label -1; a label is the number of a class"),
        ([0, 1, 2, "cat"], "'s3' has the label 'cat'"),
        ([0, 1, 2, 1.5], "'s3' has the label 1.5"),
        ([0, 1, 2, True], "'s3' has the label True"),
        ([0, 1, 2, None], "'s3' has the label None"),
        ([0, 1, 2, [0, 1]], "'s3' has 2 labels, and output 'y' 1 row;"),
        ([0, 1, 2, []], "'s3' has 0 labels"),
        ("cat", "is a str; labels are a list"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path: Path, labels: object, said: str) -> None:
    with pytest.raises(SampleError, match=said):
        _judge(_folder(tmp_path, labels))(Session(parse(IDENTITY)))


def test_files_of_labels_that_cannot_be_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path, [0, 1, 2, 0])
    (folder / "labels.json").write_text("[1, 2")
    with pytest.raises(SampleError, match="cannot be read as JSON"):
        _judge(folder)
    (folder / "labels.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SampleError, match="cannot be read as JSON"):
        _judge(folder)
    (folder / "labels.json").unlink()
    with pytest.raises(SampleError, match="there is no file"):
        _judge(folder)


def test_two_samples_of_one_name_cannot_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text("[0, 1]")

    with pytest.raises(SampleError, match="two samples are named 'a'"):
        labels_of(tmp_path / "labels.json", ["a", "a"])
