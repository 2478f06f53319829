"""A search from end to end: the same result however often it was interrupted, wherever it runs."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tuned import DIGITS, IMAGES, Counting, classifier, images, vectors, written

from graphopt import loading
from graphopt.errors import GraphoptError, SampleError, SearchStopped, SpecError
from graphopt.registry import parse_passes
from graphopt.runtime import Session
from graphopt.testing import parse
from graphopt.tune import Tuning, tune
from graphopt.verifying import Verifier

QUICK = "llm-decode"
"""The scenario of one trunk, and of few options."""


def quickly(model: object, cache: Path, samples: object = None, **options: object) -> Tuning:
    settings: dict[str, object] = {"max_drop": 5.0, "scenario": QUICK, "executor": Counting()}
    return tune(
        model,  # type: ignore[arg-type]
        samples=list(vectors(40)) if samples is None else samples,  # type: ignore[arg-type]
        cache=cache,
        **{**settings, **options},  # type: ignore[arg-type]
    )


def found(tuning: Tuning) -> object:
    """All that does not say how long something took."""
    points = [replace(point, latency_ratio=None) for point in tuning.points]
    return points, tuning.probes, tuning.certificate, tuning.parts, tuning.notes


def bytes_of(tuning: Tuning, path: Path) -> bytes:
    tuning.save(path)
    return path.read_bytes()


def test_it_finds_a_smaller_model_within_the_drop_and_says_how(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    tuning = quickly(classifier(), tmp_path / "cache", executor=first)

    (taken,) = (point for point in tuning.points if point.chosen)
    assert taken.built
    assert taken.drop <= 5.0
    assert taken.size_ratio < 0.5
    assert "quantize-weights{" in taken.passes
    assert parse_passes(taken.passes)
    size = len(bytes_of(tuning, tmp_path / "out.onnx"))
    # What it was made by is written into the file, too.
    assert 0 < size - taken.size_ratio * tuning.run.original.stored_bytes < 1500
    assert tuning.certificate.items == tuning.parts[2] == 8
    assert not tuning.certificate.certified
    assert "8 samples cannot prove a drop of at most 5" in (tuning.certificate.reason or "")

    # Once more it tries nothing again, and finds the same.
    again = quickly(classifier(), tmp_path / "cache", executor=second)
    assert first.count("run_task") > second.count("run_task") == 0
    assert found(again) == found(tuning)
    assert bytes_of(again, tmp_path / "a") == bytes_of(tuning, tmp_path / "b")


def test_candidates_are_judged_so_often_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.search.EVALUATIONS", 2)

    tuning = quickly(classifier(), tmp_path / "cache")

    # The trunk and a point of its layers, and one of them on what is kept back.
    assert sum(point.built for point in tuning.points) == 2
    assert tuning.evaluations == 3


def test_where_one_is_rejected_milder_choices_of_its_layers_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = quickly(classifier(), tmp_path / "cache")
    told = iter([6.0, 0.0])
    monkeypatch.setattr(Verifier, "_together", lambda *_: next(told))

    tuning = quickly(classifier(), tmp_path / "cache")

    (rejected,), (taken,) = ([p for p in one.points if p.chosen] for one in (before, tuning))
    assert taken.passes not in {point.passes for point in before.points}
    assert rejected.size_ratio < taken.size_ratio < tuning.points[0].size_ratio
    (drop,) = (point.drop for point in tuning.points if point.passes == rejected.passes)
    assert drop == pytest.approx(6.0)
    assert [note for note in tuning.notes if "not taken" in note and "about 6" in note]
    assert tuning.certificate.confidence == pytest.approx(1 - 0.05 / 4)


@pytest.mark.parametrize(("evaluations", "built"), [(20, 4), (6, 4), (5, 3)])
def test_milder_ones_are_built_until_one_is_within_the_drop_or_there_were_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluations: int, built: int
) -> None:
    told = iter([60.0, 0.0])
    monkeypatch.setattr(Verifier, "_together", lambda *_: next(told))
    monkeypatch.setattr("graphopt.growth.STEP_MAXIMUM", 2.0)
    monkeypatch.setattr("graphopt.search.EVALUATIONS_MAXIMUM", evaluations)

    tuning = quickly(classifier(), tmp_path)

    drops = [point.drop for point in tuning.points if point.built]
    assert len(drops) == built
    assert tuning.evaluations == built + 2 <= evaluations
    (taken,) = (point for point in tuning.points if point.chosen)
    # The second one is milder, but over the drop; the third is not.
    assert drops[1] == pytest.approx(60.0)
    assert drops[2] > 5.0
    assert taken is (tuning.points[3] if built == 4 else tuning.points[0])
    assert taken.drop <= 5.0


def test_where_no_more_is_built_what_is_told_of_one_still_counts_for_its_trunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = quickly(classifier(), tmp_path, scenario="edge", max_drop=1.0)
    built = [point for point in before.points if point.built and point.options]
    assert sum(point.drop <= 1.0 for point in built) > 1
    monkeypatch.setattr("graphopt.search.EVALUATIONS_MAXIMUM", 0)
    told = iter([1e4, 0.0])
    monkeypatch.setattr(Verifier, "_together", lambda *_: next(told))

    tuning = quickly(classifier(), tmp_path, scenario="edge", max_drop=1.0)

    assert all(point.drop > 1.0 for point in tuning.points if point.built and point.options)
    assert tuning.points[0].chosen


def test_where_samples_take_long_fewer_serve_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphopt.pace._fastest", lambda *_: 0.5)

    tuning = quickly(classifier(), tmp_path)

    assert tuning.parts == (16, 16, 8)
    assert any("there is time to fit by 16 and to search by 16" in note for note in tuning.notes)
    assert not quickly(classifier(), tmp_path, samples=list(vectors(20))).notes


@pytest.mark.parametrize("fitted", [128, 16])
def test_what_was_fitted_on_many_is_taken_as_it_was_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitted: int
) -> None:
    monkeypatch.setattr("graphopt.parting.FITTED_MAXIMUM", fitted)
    counting = Counting()

    tuning = quickly(classifier(), tmp_path, executor=counting)

    assert tuning.parts == ((21, 11, 8) if fitted > 21 else (16, 16, 8))
    more = counting.count("build_model") - sum(point.built for point in tuning.points)
    assert more == (1 if fitted > 21 else 0)


@pytest.mark.slow
def test_wherever_workers_are_lost_it_goes_on_from_there(tmp_path: Path) -> None:
    whole = Counting()
    expected = quickly(classifier(), tmp_path / "other", executor=whole)
    done = 0

    for after in range(1, len(whole.done) + 1):
        some = Counting(stop_after=1)
        try:
            tuning = quickly(classifier(), tmp_path / "cache", executor=some)
        except SearchStopped as error:
            assert "the worker is gone" in str(error)
        done += len(some.done)
        assert done == after

    assert found(tuning) == found(expected)
    assert bytes_of(tuning, tmp_path / "a") == bytes_of(expected, tmp_path / "b")
    assert list((tmp_path / "cache" / "models").glob("*/*")) == []


@pytest.mark.slow
def test_two_searches_at_a_time_find_what_one_does(tmp_path: Path) -> None:
    expected = quickly(classifier(), tmp_path / "other")

    with ThreadPoolExecutor(2) as threads, ThreadPoolExecutor(2) as workers:
        both = [
            threads.submit(quickly, classifier(), tmp_path / "cache", executor=workers)
            for _ in range(2)
        ]
        results = [one.result() for one in both]

    for number, result in enumerate(results):
        assert found(result) == found(expected)
        path = tmp_path / f"{number}.onnx"
        assert bytes_of(result, path) == bytes_of(expected, tmp_path / "expected.onnx")


GIVEN: dict[str, Callable[[Path], object]] = {
    "a path": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "a proto": lambda path: onnx.load(path),
    "a model": lambda path: loading.load(path),
}


@pytest.mark.parametrize(
    "form",
    [form if form == "bytes" else pytest.param(form, marks=pytest.mark.slow) for form in GIVEN],
)
def test_models_in_every_form_and_samples_that_are_read_once(tmp_path: Path, form: str) -> None:
    path = written(tmp_path / "model.onnx")

    tuning = quickly(GIVEN[form](path), tmp_path / "cache", samples=vectors(40))

    assert tuning.parts == (21, 11, 8)
    assert any(point.chosen for point in tuning.points)


def test_weights_in_external_data_outlive_the_search(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    path = written(tmp_path / "given" / "model.onnx", external_data=True)

    quickly(path, tmp_path / "cache").save(tmp_path / "out.onnx")

    assert len(list(tmp_path.glob("*.data"))) == 1
    (sample,) = vectors(1)
    before, after = (Session(one).run(sample)["y"] for one in (path, tmp_path / "out.onnx"))
    assert 0 < np.abs(before - after).max() < np.abs(before).max() / 2


def test_one_sample_serves_for_everything(tmp_path: Path) -> None:
    tuning = quickly(classifier(), tmp_path / "cache", samples=vectors(1))

    assert tuning.parts == (1, 1, 1)
    assert tuning.certificate.bound is None
    assert tuning.certificate.reason == (
        "there are too few samples to keep some of them from the search"
    )


@pytest.mark.parametrize("scenario", [QUICK, pytest.param("edge", marks=pytest.mark.slow)])
def test_a_model_without_layers_stays_what_it_is(tmp_path: Path, scenario: str) -> None:
    model = parse("agraph (float[N, 16] x) => (float[N, 16] y) { y = Relu(x) }")

    tuning = quickly(model, tmp_path / "cache", scenario=scenario)

    assert tuning.probes == ()
    assert [node.op_type for node in tuning.run.model.graph] == ["Relu"]
    assert tuning.certificate.drop == 0


def test_an_original_whose_outputs_are_no_numbers_is_compared_by_where(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    model = parse(
        "agraph (float[N, 16] x, float[16, 32] v, float[32, 32] w) => (float[N, 32] y)"
        " { a = MatMul(x, v) h = MatMul(a, w) y = Log(h) }",
        v=weight[:16],
        w=weight,
    )

    tuning = quickly(model, tmp_path / "cache")

    assert tuning.certificate.drop <= 5.0
    assert all(not np.isnan(point.drop) for point in tuning.points)


def test_a_random_model_is_refused(tmp_path: Path) -> None:
    model = parse(
        "agraph (float[N, 16] x) => (float[N, 16] y) { r = RandomNormalLike(x) y = Add(x, r) }"
    )

    with pytest.raises(SampleError, match="the model is random: no drop can be measured of it"):
        quickly(model, tmp_path / "cache")


def test_bodies_of_an_if_stay(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    model = parse(
        """
        agraph (float[N, 16] x, float[16, 32] v, float[32, 32] w) => (float[N, 32] y) {
            a = MatMul(x, v)
            total = ReduceSum<keepdims = 0>(a)
            zero = Constant<value_float = 0.0>()
            c = Greater(total, zero)
            y = If(c) <
                then_branch = t () => (float[N, 32] p) { p = MatMul(a, w) },
                else_branch = e () => (float[N, 32] q) { q = Neg(a) }
            >
        }""",
        v=weight[:16],
        w=weight,
    )

    tuning = quickly(model, tmp_path / "cache")

    assert {probe.layer for probe in tuning.probes} <= {"v", "w"}
    assert tuning.certificate.drop <= 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": "much"}, "max-drop is 'much'; it must be a number"),
        ({"max_drop": -1}, "max-drop is -1; it must be a number"),
        ({"max_drop": float("nan")}, "max-drop is nan"),
        ({"confidence": 1.0}, "confidence is 1; it must be between 0 and 1"),
        ({"budget_minutes": 0}, "budget_minutes is 0; it must be above 0"),
        ({"jobs": 0}, "jobs is 0; it must be 1 or more"),
        ({"objective": "size"}, "the scenario 'llm-decode' is for memory, and not for size"),
        ({"executor": "thread"}, "'thread' is no executor"),
    ],
)
def test_what_does_not_fit_is_told(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        quickly(classifier(), tmp_path / "cache", **options)


def test_a_cache_that_cannot_be_written_is_told_before_the_model_is_even_read(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(GraphoptError, match=r"cannot be used .*give another folder with --cache"):
        quickly(tmp_path / "no.onnx", tmp_path / "file")


@pytest.mark.slow
def test_nothing_within_no_drop_leaves_the_lossless_model(tmp_path: Path) -> None:
    tuning = quickly(classifier(), tmp_path / "cache", max_drop=0, certify=True)

    assert not any(point.chosen for point in tuning.points)
    assert tuning.certificate.drop == 0
    assert len(list(tuning.run.model.graph)) == 5


# ------------------------------------------------------------------ interrupted by force

SEARCH = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from graphopt.tune import tune
model, samples, cache = map(Path, sys.argv[1:4])
tune(
    model, samples=samples, max_drop=1.0, cache=cache, executor=ThreadPoolExecutor(1),
    progress=lambda text: print(text, flush=True), budget_minutes=60,
)
"""


@pytest.mark.slow
def test_killed_five_times_it_finds_the_same_and_tries_nothing_twice(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", image=np.concatenate([one["image"][None] for one in images(80)]))
    samples, chance = tmp_path / "few.npz", random.Random(7)

    def search(cache: Path, executor: Counting) -> Tuning:
        return tune(
            DIGITS,
            samples=samples,
            max_drop=1.0,
            cache=cache,
            executor=executor,
            budget_minutes=60,
        )

    whole = Counting()
    expected = search(tmp_path / "other", whole)
    cache, kills = tmp_path / "cache", 0
    before: dict[Path, tuple[int, bytes]] = {}
    while kills < 5:
        command = [sys.executable, "-c", SEARCH, str(DIGITS), str(samples), str(cache)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        # Each a bit later than the one before, so that there is more and more to lose.
        told = (line for line in child.stdout if line.startswith(("float:", "int8:", "probed")))
        for _ in range(min(kills + 1, 4)):
            next(told)
        time.sleep(chance.uniform(0.0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        kills += 1
        kept = results_of(cache)
        assert before.items() <= kept.items()
        before = kept
    assert len(before) > 1

    rest = Counting()
    tuning = search(cache, rest)

    assert before.items() <= results_of(cache).items()
    assert len(rest.done) < len(whole.done)
    assert results_of(cache).keys() == {
        cache / path.relative_to(tmp_path / "other") for path in results_of(tmp_path / "other")
    }
    assert found(tuning) == found(expected)
    assert bytes_of(tuning, tmp_path / "a") == bytes_of(expected, tmp_path / "b")


def results_of(cache: Path) -> dict[Path, tuple[int, bytes]]:
    """The results that are kept, and when each was written."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in cache.rglob("*.json")}


@pytest.mark.slow
def test_the_digits_become_much_smaller_in_processes_as_in_threads(tmp_path: Path) -> None:
    results = [
        tune(DIGITS, samples=IMAGES, max_drop=1.0, cache=tmp_path / name, budget_minutes=60, **how)
        for name, how in (("a", {"jobs": 2}), ("b", {"executor": ThreadPoolExecutor(2)}))
    ]

    (taken,) = (point for point in results[0].points if point.chosen)
    assert taken.size_ratio < 0.25
    assert found(results[0]) == found(results[1])
    assert bytes_of(results[0], tmp_path / "a.onnx") == bytes_of(results[1], tmp_path / "b.onnx")
    assert results[0].certificate.items == 60
    assert isinstance(results[0].run.model, ir.Model)
