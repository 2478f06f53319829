"""A trial in a folder is the same trial wherever it is opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tuned import LAYERS, classifier, feeds, trial_in, vectors, written

from graphopt import loading
from graphopt.errors import SearchStopped
from graphopt.runtime import Session
from graphopt.subject import open_subject
from graphopt.testing import parse
from graphopt.trial import JUDGED, open_trial, packed, read_setup, scales_of, unpacked, write_trial

COUNTER = """
agraph (float[1, 4] x, float[1, 4] h) => (float[1, 4] y, float[1, 4] g)
<float[4] w = {0.5, 0.25, 0.125, 2.0}> {
    s = Mul(h, w)
    g = Add(s, x)
    y = Relu(g)
}
"""


def key(folder: Path) -> str:
    return read_setup(folder).key


def test_the_base_agrees_with_the_original(tmp_path: Path) -> None:
    trial = open_trial(trial_in(tmp_path / "trial"))

    assert trial.base_glanced.value == 100
    assert trial.base_glanced.divergence == pytest.approx(0, abs=1e-9)
    assert len(list(trial.context.samples)) == 24


def test_what_passes_make_is_judged_by_other_samples_and_the_base_stays(tmp_path: Path) -> None:
    trial = open_trial(trial_in(tmp_path / "trial"))
    before = trial.stored_bytes(trial.base)

    model, steps = trial.rewritten("cluster-weights{each=(w2:2)}")

    assert [step.kept for step in steps] == [True]
    assert trial.stored_bytes(model) < trial.stored_bytes(trial.base) == before
    scores = trial.scores(model)
    assert scores.value < 100
    assert scores.divergence is not None and scores.divergence > 1e-4


def test_few_samples_are_expected_to_hide_the_worst(tmp_path: Path) -> None:
    trial = open_trial(trial_in(tmp_path / "trial"))
    model, _ = trial.rewritten("cluster-weights{each=(w2:2)}")
    scores, glanced, seen = trial.scores(model), trial.glanced(model), trial.recall(Session(model))
    assert scores.divergences is not None and seen.divergences is not None
    assert glanced.divergence is not None and seen.divergence is not None

    found = trial.expected(model, scores, glanced)

    ratio = max(glanced.divergence / seen.divergence, 1)
    both = np.concatenate([scores.divergences, ratio * seen.divergences])
    assert found.divergence == pytest.approx(both.mean() + both.std() / len(both) ** 0.5)
    assert found.divergence > scores.divergence


@pytest.mark.parametrize("external_data", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
def test_packed_it_is_the_same_where_nothing_of_it_lies(
    tmp_path: Path, external_data: bool, in_memory: bool
) -> None:
    path = written(tmp_path / "model.onnx", external_data=external_data)
    folder = trial_in(tmp_path / "trial", loading.load(path) if in_memory else path)
    passes = "cluster-weights{each=(w1:8,w2:4)}"
    model, _ = open_trial(folder).rewritten(passes)
    scores = open_trial(folder).scores(model)

    content, first = packed(folder), key(folder)
    shutil.rmtree(folder)
    for file in tmp_path.iterdir():
        file.unlink()
    there = open_trial(unpacked(content, tmp_path / "there"))

    assert there.setup.key == first
    other, _ = there.rewritten(passes)
    found = there.scores(other)
    assert (found.value, found.divergence) == (scores.value, scores.divergence)
    assert there.stored_bytes(other) > 0
    for name in LAYERS:
        assert name in there.base.graph.initializers


def test_samples_keep_their_order_where_there_are_ten_and_more(tmp_path: Path) -> None:
    given = list(vectors(44))
    trial = open_trial(trial_in(tmp_path / "trial", samples=given))

    found = [sample["x"] for sample in trial.context.samples]

    expected = [sample["x"] for sample in given[:22]]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))


def test_state_is_carried_in_whole_sequences(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = tmp_path / "samples"
    for sequence, length in enumerate([3, 1, 12, 2]):
        (samples / f"s{sequence}").mkdir(parents=True)
        for step in range(length):
            x = rng.standard_normal((1, 4)).astype(np.float32)
            np.savez(samples / f"s{sequence}" / f"{step:02d}.npz", x=x)
    subject = open_subject(parse(COUNTER), "cpu", True, True, lambda _: None)
    feed = subject.feed(samples, None, (("g", "h"),))
    folder = tmp_path / "trial"
    folder.mkdir()
    model = subject.source.model

    scales = scales_of(model, subject.given, feed, "cpu")
    write_trial(folder, model, subject.given, model, feed, feed, "cpu", None, scales)
    trial = open_trial(folder)

    assert trial.setup.state == (("g", "h"),)
    assert [len(s) for s in trial.judge.part.samples.sequences] == [3, 1, 12, 2]  # type: ignore[attr-defined]
    assert trial.base_glanced.value == 100
    assert len(trial.base_glanced.per_item) == 4  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[Path], Path]] = {
    "samples": lambda folder: trial_in(folder, samples=list(vectors(48, seed=1))),
    "their number": lambda folder: trial_in(folder, count=12),
    "a weight": lambda folder: trial_in(folder, _with_a_weight_changed()),
    "a name": lambda folder: trial_in(folder, classifier({"w1": "other"})),
}


def _with_a_weight_changed() -> object:
    model = classifier()
    value = model.graph.initializers["w2"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[0, 0] += 1
    value.const_value = type(value.const_value)(array, name="w2")  # type: ignore[call-arg]
    return model


@pytest.mark.parametrize("what", CHANGES)
def test_the_key_is_another_with_other(tmp_path: Path, what: str) -> None:
    assert key(CHANGES[what](tmp_path / "a")) != key(trial_in(tmp_path / "b"))


def test_the_key_is_the_same_in_another_folder_and_from_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "model.onnx")

    keys = {key(trial_in(tmp_path / "a")), key(trial_in(tmp_path / "b"))}

    assert keys == {key(trial_in(tmp_path / "c", path))}


def test_a_folder_that_was_cleared_is_told(tmp_path: Path) -> None:
    folder = trial_in(tmp_path / "trial")
    shutil.rmtree(folder)

    with pytest.raises(SearchStopped, match=r"trial, cannot be read .*TMPDIR"):
        open_trial(folder)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    subject = open_subject(classifier(), "cpu", True, True, lambda _: None)
    feed = subject.feed(list(vectors(2)), None, ())
    model = subject.source.model
    (tmp_path / JUDGED).write_text("a file where a folder is to be")

    with pytest.raises(SearchStopped, match=r"cannot be kept .*make room there, or set TMPDIR"):
        write_trial(tmp_path, model, subject.given, model, feed, feed, "cpu", None, {})


def test_layers_are_compared_by_as_many_samples_as_are_wanted(tmp_path: Path) -> None:
    subject = open_subject(classifier(), "cpu", True, True, lambda _: None)
    fitted, judged = feeds(subject)
    model = subject.source.model
    scales = scales_of(model, subject.given, judged, "cpu")
    trials = []
    for glanced in (8, 128):
        folder = tmp_path / str(glanced)
        folder.mkdir()
        write_trial(
            folder, model, subject.given, model, fitted, judged, "cpu", None, scales, glanced
        )
        trials.append(open_trial(folder))

    counts = [len(trial.base_glanced.per_item) for trial in trials]  # type: ignore[arg-type]

    assert counts == [8, 24]
    assert len({trial.setup.key for trial in trials}) == 2
    assert all(trial.setup.scales == scales for trial in trials)
