"""Models built for a search, in workers: what passes make of the base of a trial, judged.

What was built is kept on disk until the search ends (`graphopt.kept_models`), and what was found of
it for good.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from graphopt import saving
from graphopt.contract import Effect, Skip
from graphopt.errors import ModelError, SearchStopped
from graphopt.executors import Workers, result_of
from graphopt.ledger import Step
from graphopt.pipeline import RAISED
from graphopt.probe_cache import ProbeCache, cache_key, whole_file
from graphopt.probing import shared_folder
from graphopt.trial import open_trial, read_setup


@dataclass(frozen=True)
class Built:
    """A model that passes made of the base of a trial.

    Attributes:
        path: of its file, for as long as the search goes on.
        passes: in text form.
        steps: the ledger.
        stored_bytes: that it takes on disk.
        divergence: of its outputs from the original's, on the samples on which layers are probed.
        likely_divergence: on other samples; see `graphopt.trial.Expected`.
        loss: of agreement with the original, in points.
        disagreement: share of answers that differ, or None.
    """

    path: Path
    passes: str
    steps: tuple[Step, ...]
    stored_bytes: int
    divergence: float
    likely_divergence: float
    loss: float
    disagreement: float | None


@dataclass(frozen=True)
class Build:
    """A model that is being built.

    Attributes:
        wait: for the result; raises what the worker raised.
        is_done: nothing is left to wait for.
    """

    wait: Callable[[], Built]
    is_done: Callable[[], bool]


def build(folder: Path, passes: str, models: Path, workers: Workers, cache: ProbeCache) -> Build:
    """Begin to build a model; what was built before is taken again.

    Args:
        folder: of the trial.
        passes: in text form.
        models: folder in which models are kept.
        workers: one of which does it.
        cache: of what was found before.
    """
    key = cache_key("build", read_setup(folder).key, passes)
    path = models / f"{key}.onnx"
    known = cache.get(key)
    if known is not None and path.exists():
        found = _built(path, passes, known)
        return Build(lambda: found, lambda: True)
    shared = workers.share(folder)
    future = workers.submit(build_model, shared, passes, str(path), not workers.shares_disk)
    return Build(lambda: _taken(future, path, passes, key, cache), future.done)


def _taken(
    future: Future[dict[str, Any]], path: Path, passes: str, key: str, cache: ProbeCache
) -> Built:
    found = result_of(future)
    _keep(found["files"], path.parent)
    found = {name: value for name, value in found.items() if name != "files"}
    built = _built(path, passes, found)
    if not any((step.reason or "").startswith(RAISED) for step in built.steps):
        cache.put(key, found)
    return built


def _keep(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files of a model that was built elsewhere, the graph last: then all are there."""
    try:
        for name, content in files.items():
            with whole_file(folder / name) as file:
                file.write(content)
    except OSError as error:
        raise SearchStopped(
            f"a model cannot be kept in {folder} ({error.strerror}); make room there, or give "
            "another folder with --cache"
        ) from error


def _built(path: Path, passes: str, found: dict[str, Any]) -> Built:
    steps = tuple(map(_step, found["steps"]))
    return Built(path, passes, steps, **{k: v for k, v in found.items() if k != "steps"})


def _step(content: dict[str, Any]) -> Step:
    return Step(
        **{
            **content,
            "effect": Effect(content["effect"]),
            "skips": tuple(Skip(**skip) for skip in content["skips"]),
            "notes": tuple(content["notes"]),
        }
    )


# ------------------------------------------------------------------ in the worker


def build_model(shared: str | bytes, passes: str, into: str, sends: bool) -> dict[str, Any]:
    """Build a model and judge it; the result as plain data.

    Args:
        shared: see `graphopt.probing.run_task`.
        passes: in text form.
        into: path to write the model to.
        sends: that is on another machine: return what would be in its files, by their names.
    """
    with shared_folder(shared) as folder, threadpool_limits(1):
        trial = open_trial(folder)
        model, steps = trial.rewritten(passes, loads=True)
        scores, glanced = trial.scores(model), trial.glanced(model)
        expected = trial.expected(model, scores, glanced)
        return {
            "steps": [asdict(step) for step in steps],
            "stored_bytes": trial.stored_bytes(model),
            "divergence": glanced.divergence,
            "likely_divergence": expected.divergence,
            "loss": expected.loss,
            "disagreement": scores.disagreement,
            "files": _saved(model, Path(into), trial.setup.external_data, sends),
        }


def _saved(
    model: ir.Model, path: Path, external_data: bool | None, sends: bool
) -> dict[str, bytes]:
    """Write a model; what is to be sent, the graph last, or nothing."""
    if not sends:
        try:
            saving.save(model, path, external_data=external_data)
        except ModelError as error:
            raise SearchStopped(f"a model cannot be kept for the search: {error}") from error
        return {}
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        graph = Path(folder) / path.name
        saving.save(model, graph, external_data=external_data)
        files = sorted(Path(folder).iterdir(), key=lambda file: file == graph)
        return {file.name: file.read_bytes() for file in files}
