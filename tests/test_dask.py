"""Workers of a Dask cluster find what processes of this machine do, and may be lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tuned import Counting, classifier, vectors, written

from graphopt.errors import GraphoptError, SearchStopped
from graphopt.tune import Tuning, tune

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as found:
        yield found


def search(model: object, cache: Path, executor: object, **options: object) -> Tuning:
    return tune(
        model,  # type: ignore[arg-type]
        samples=vectors(40),
        max_drop=5.0,
        cache=cache,
        executor=executor,  # type: ignore[arg-type]
        budget_minutes=60,
        **options,  # type: ignore[arg-type]
    )


def address(cluster: Any) -> str:
    return str(cluster.scheduler_address).replace("tcp://", "dask://")


def found(tuning: Tuning) -> object:
    points = [replace(point, latency_ratio=None) for point in tuning.points]
    return points, tuning.probes, tuning.certificate


@pytest.mark.parametrize("external_data", [False, True])
def test_they_find_the_same(tmp_path: Path, cluster: Any, external_data: bool) -> None:
    model = written(tmp_path / "model.onnx", external_data=external_data)

    near = search(model, tmp_path / "near", Counting()).save(tmp_path / "near.onnx")
    far = search(model, tmp_path / "far", address(cluster)).save(tmp_path / "far.onnx")

    assert found(far) == found(near)
    assert any(point.chosen and point.size_ratio < 0.7 for point in far.points)
    if not external_data:
        assert (tmp_path / "far.onnx").read_bytes() == (tmp_path / "near.onnx").read_bytes()


def test_a_cluster_that_is_lost_is_told_and_the_search_goes_on_elsewhere(
    tmp_path: Path, cluster: Any
) -> None:
    expected = search(classifier(), tmp_path / "other", Counting())
    closed = threading.Event()

    def close(text: str) -> None:
        # Once the first model has come back, with others still being built.
        if text.startswith("float:") and not closed.is_set():
            closed.set()
            cluster.close()

    with pytest.raises(SearchStopped, match="a worker was lost, or failed"):
        search(classifier(), tmp_path / "cache", address(cluster), progress=close)
    assert closed.is_set()
    rest = Counting()
    again = search(classifier(), tmp_path / "cache", rest)

    assert found(again) == found(expected)
    assert sum(args[1:2] == (expected.points[0].passes,) for _, args in rest.done) == 0


def test_a_worker_that_is_killed_is_made_good_for_or_told(tmp_path: Path, cluster: Any) -> None:
    expected = search(classifier(), tmp_path / "other", Counting())
    processes = [worker.pid for worker in cluster.workers.values()]
    killed = threading.Event()

    def kill(text: str) -> None:
        if text.startswith("float:") and not killed.is_set():
            killed.set()
            os.kill(processes[0], 9)

    try:
        tuning = search(classifier(), tmp_path / "cache", address(cluster), progress=kill)
    except SearchStopped as error:
        # What only that worker had is lost, if it came at the wrong moment.
        assert "goes on from there" in str(error)
        tuning = search(classifier(), tmp_path / "cache", address(cluster))

    assert killed.is_set()
    assert found(tuning) == found(expected)


def test_a_cluster_without_workers_is_told(tmp_path: Path) -> None:
    with (
        distributed.LocalCluster(
            n_workers=0, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as empty,
        pytest.raises(GraphoptError, match="has no workers; start `dask worker`"),
    ):
        search(classifier(), tmp_path, address(empty))


def test_where_nobody_listens_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match=r"there is no Dask scheduler at 127\.0\.0\.1:1 "):
        search(classifier(), tmp_path, "dask://127.0.0.1:1")
