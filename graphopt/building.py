"""Models built for a search, in workers: what passes make of the base of a trial, judged.

What was built is kept on disk until the search ends, and what was found of it for good.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from graphopt import loading, saving
from graphopt.contract import Effect, Skip
from graphopt.executors import Workers
from graphopt.ledger import Step
from graphopt.probe_cache import ProbeCache, cache_key
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
        loss: of agreement with the original, in points.
        disagreement: share of answers that differ, or None.
    """

    path: Path
    passes: str
    steps: tuple[Step, ...]
    stored_bytes: int
    divergence: float
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
    into = str(path) if workers.shares_disk else None
    future = workers.executor.submit(build_model, workers.share(folder), passes, into)
    return Build(lambda: _taken(future, path, passes, key, cache), future.done)


def _taken(
    future: Future[dict[str, Any]], path: Path, passes: str, key: str, cache: ProbeCache
) -> Built:
    found = dict(future.result())
    content = found.pop("model", None)
    if content is not None:
        saving.save(loading.load(content), path)
    cache.put(key, found)
    return _built(path, passes, found)


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


def build_model(shared: str | bytes, passes: str, into: str | None) -> dict[str, Any]:
    """Build a model and judge it; the result as plain data.

    Args:
        shared: see `graphopt.probing.run_task`.
        passes: in text form.
        into: path to write the model to; None returns its bytes.
    """
    with shared_folder(shared) as folder, threadpool_limits(1):
        trial = open_trial(folder)
        model, steps = trial.rewritten(passes, loads=True)
        scores, glanced = trial.scores(model), trial.glanced(model)
        found = {
            "steps": [asdict(step) for step in steps],
            "stored_bytes": trial.stored_bytes(model),
            "divergence": glanced.divergence,
            "loss": 100.0 - scores.value,
            "disagreement": scores.disagreement,
        }
        if into is not None:
            saving.save(model, into, external_data=trial.setup.external_data)
            return found
        return {**found, "model": _bytes_of(model)}


def _bytes_of(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()
