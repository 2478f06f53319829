"""Models are built once, in workers, and come back whole."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tuned import Counting, at_once, trial_in, written

from graphopt import loading
from graphopt.building import build
from graphopt.errors import ModelError, SearchStopped
from graphopt.executors import Workers
from graphopt.probe_cache import ProbeCache
from graphopt.runtime import Session
from graphopt.trial import open_trial, packed

PASSES = "cluster-weights{each=(w1:8,w2:4)}"


def models_in(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_what_was_built_is_what_it_says(tmp_path: Path) -> None:
    folder = trial_in(tmp_path / "trial")

    built = build(
        folder, PASSES, models_in(tmp_path / "models"), at_once(), ProbeCache(tmp_path / "cache")
    ).wait()

    assert built.path.stat().st_size == built.stored_bytes
    trial = open_trial(folder)
    glanced = trial.glance(Session(built.path, threads=1))
    model = loading.load(built.path)
    expected = trial.expected(model, trial.scores(model), glanced)
    assert (built.loss, built.divergence) == (expected.loss, glanced.divergence)
    assert built.likely_divergence == expected.divergence
    assert [step.spec for step in built.steps] == [PASSES]
    assert built.steps[0].kept


def test_it_is_built_once_and_again_where_its_file_is_gone(tmp_path: Path) -> None:
    folder, cache = trial_in(tmp_path / "trial"), ProbeCache(tmp_path / "cache")
    models, executor = models_in(tmp_path / "models"), Counting()

    found = [build(folder, PASSES, models, at_once(executor), cache).wait() for _ in range(3)]

    assert executor.count("build_model") == 1
    assert found[0] == found[1] == found[2]
    first = found[0].path.read_bytes()
    found[0].path.unlink()
    again = build(folder, PASSES, models, at_once(executor), cache).wait()
    assert executor.count("build_model") == 2
    assert again.path.read_bytes() == first


@pytest.mark.parametrize("external_data", [False, True])
def test_from_a_worker_on_another_machine_it_comes_back_the_same(
    tmp_path: Path, external_data: bool
) -> None:
    path = written(tmp_path / "model.onnx", external_data=external_data)
    folder = trial_in(tmp_path / "trial", path)
    far = Workers(Counting(), 1, packed, shares_disk=False)
    here, there = models_in(tmp_path / "here"), models_in(tmp_path / "there")

    near = build(folder, PASSES, here, at_once(), ProbeCache(tmp_path / "c")).wait()
    came = build(folder, PASSES, there, far, ProbeCache(tmp_path / "d")).wait()

    assert replace(came, steps=()) == replace(near, steps=(), path=came.path)
    names = sorted(file.name for file in here.iterdir())
    assert names == sorted(file.name for file in there.iterdir())
    assert len(names) == (2 if external_data else 1)
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes()
    loading.load(came.path)


def test_a_pass_that_does_nothing_gives_the_base(tmp_path: Path) -> None:
    folder = trial_in(tmp_path / "trial")

    built = build(
        folder, "", models_in(tmp_path / "m"), at_once(), ProbeCache(tmp_path / "c")
    ).wait()

    assert built.steps == ()
    assert built.loss == 0


def test_what_the_worker_says_of_the_passes_is_passed_on(tmp_path: Path) -> None:
    folder = trial_in(tmp_path / "trial")

    one = build(folder, "no-such", models_in(tmp_path / "m"), at_once(), ProbeCache(tmp_path / "c"))

    with pytest.raises(Exception, match="there is no pass 'no-such'"):
        one.wait()


def test_where_there_is_no_room_the_search_stops(tmp_path: Path) -> None:
    folder = trial_in(tmp_path / "trial")
    models = models_in(tmp_path / "models")
    shutil.rmtree(models)

    with pytest.raises(SearchStopped, match="a model cannot be kept for the search"):
        build(folder, PASSES, models, at_once(), ProbeCache(tmp_path / "c")).wait()


def test_that_a_worker_is_lost_is_no_fault_of_the_model(tmp_path: Path) -> None:
    folder = trial_in(tmp_path / "trial")
    lost = at_once(Counting(stop_after=0))

    with pytest.raises(SearchStopped, match="ConnectionResetError") as caught:
        build(folder, PASSES, models_in(tmp_path / "m"), lost, ProbeCache(tmp_path / "c")).wait()

    assert not isinstance(caught.value, ModelError)


def test_many_at_a_time_build_what_one_alone_does(tmp_path: Path) -> None:
    folder, cache = trial_in(tmp_path / "trial"), ProbeCache(tmp_path / "cache")
    texts = [f"cluster-weights{{each=(w2:{count})}}" for count in (4, 8, 16, 32)]

    def bytes_of(workers: Workers, name: str) -> list[bytes]:
        models = models_in(tmp_path / name)
        running = [build(folder, text, models, workers, cache) for text in texts]
        return [one.wait().path.read_bytes() for one in running]

    with ThreadPoolExecutor(4) as threads:
        assert bytes_of(at_once(threads), "many") == bytes_of(at_once(), "one")
