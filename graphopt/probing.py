"""What each option of a treatment does to each layer, tried one by one.

A layer is given an option, alone, and the outputs are compared with those of the original. Layers
go to workers a few at a time; each result is kept on disk as soon as it is there, so that a search
that was interrupted goes on where it was.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from graphopt.errors import GraphoptError
from graphopt.executors import Workers, result_of
from graphopt.pipeline import RAISED
from graphopt.probe_cache import ProbeCache, cache_key
from graphopt.treatments import Estimate, Layer, treatment
from graphopt.trial import Trial, open_trial, read_setup, unpacked

LAYERS_OF_TASK = 6
"""So many layers go to a worker together: opening a trial takes as long as some probes."""

SQUARE_MINIMUM = 1e-30
"""Of what was tried: where nothing was lost, nothing is expected to be."""


@dataclass(frozen=True)
class Probe:
    """What an option does to a model, given to one layer alone.

    Attributes:
        treatment: its name.
        layer: of the model.
        operator: that reads the weight.
        option: of the treatment.
        saved_bytes: of the file; negative where it grows.
        divergence: by how much that of the outputs grows; see `graphopt.scores.Scores`.
        loss: of agreement, in points; None where it was not measured.
        reason: why the layer could not be given the option, or None; then there are no figures.
        joint_saved_bytes: expected of the file where other layers get such options too: what layers
            share, like the tables by which codes are read, counts for none. None where the
            treatment does not say.
    """

    treatment: str
    layer: str
    operator: str
    option: str
    saved_bytes: int
    divergence: float
    loss: float | None
    reason: str | None = None
    joint_saved_bytes: int | None = None

    @property
    def measured(self) -> bool:
        """The outputs were looked at; else the figures follow from those of other options."""
        return self.loss is not None


@dataclass(frozen=True)
class Task:
    """Layers that a worker is to try.

    Attributes:
        treatment: its name.
        layers: of the base of the trial.
        every: all options are tried; else those that the treatment says, and others are estimated.
        cache: the folder of results; None where the worker does not see it.
    """

    treatment: str
    layers: tuple[Layer, ...]
    every: bool
    cache: str | None


def probe(
    folder: Path,
    layers: Mapping[str, Sequence[Layer]],
    workers: Workers,
    cache: ProbeCache,
    progress: Callable[[str], None],
    every: bool = False,
    until_s: float = math.inf,
) -> list[Probe]:
    """Try treatments on layers of the base of a trial.

    Args:
        folder: of the trial.
        layers: by the name of the treatment.
        workers: that do it.
        cache: of what was tried before.
        progress: called with a few words.
        every: try all options; else those that each treatment says, and estimate the others.
        until_s: when the time is over, by `time.monotonic`; layers that were not tried by then, the
            smallest, are left out.

    Returns:
        For each layer, in order, each option of each treatment.

    Raises:
        SearchStopped: a worker was lost, or the cache cannot be written.
        GraphoptError: the original does not run on the samples.
    """
    setup = read_setup(folder)
    keys = {
        (name, one.name): cache_key("probe", setup.key, name, one.name, str(every))
        for name, found in layers.items()
        for one in found
    }
    known = {at: found for at, key in keys.items() if (found := cache.get(key)) is not None}
    tasks = [
        Task(name, tuple(few), every, str(cache.folder) if workers.shares_disk else None)
        for name, found in layers.items()
        for few in _chunks([one for one in found if (name, one.name) not in known])
    ]
    # The large ones first: where time is short, they are what matters.
    tasks.sort(key=lambda task: -sum(one.elements for one in task.layers))
    total = sum(map(len, layers.values()))
    shared = workers.share(folder) if tasks else ""
    waiting = {workers.submit(run_task, shared, task): task for task in tasks}
    try:
        for future in _completed(waiting, until_s):
            task = waiting[future]
            results = result_of(future)
            for one, found in zip(task.layers, results, strict=True):
                at = task.treatment, one.name
                known[at] = found
                if task.cache is None and _is_lasting(found):
                    cache.put(keys[at], found)
            progress(f"probed {len(known)} of {total} layers")
    finally:
        for future in waiting:
            future.cancel()
    return [Probe(**one) for at in keys for one in known.get(at, ())]


def _completed(waiting: Collection[Future[Any]], until_s: float) -> Iterator[Future[Any]]:
    """What is done, as it is, until the time is over."""
    timeout_s = None if math.isinf(until_s) else max(until_s - time.monotonic(), 0.0)
    with suppress(TimeoutError):
        yield from as_completed(waiting, timeout_s)


def _chunks(layers: Sequence[Layer]) -> Iterator[Sequence[Layer]]:
    for start in range(0, len(layers), LAYERS_OF_TASK):
        yield layers[start : start + LAYERS_OF_TASK]


# ------------------------------------------------------------------ in the worker


def run_task(shared: str | bytes, task: Task) -> list[list[dict[str, Any]]]:
    """Try each layer of a task: for each the probes of its options, as plain data."""
    with shared_folder(shared) as folder, threadpool_limits(1):
        trial = open_trial(folder)
        method = treatment(task.treatment)
        names = [one.name for one in task.layers]
        estimates = method.estimates(trial.base, names, trial.context)
        cache = None if task.cache is None else ProbeCache(Path(task.cache))
        found = []
        for one in task.layers:
            probes = _probes(trial, task, one, estimates.get(one.name, {}))
            content = [asdict(p) for p in probes]
            if cache is not None and _is_lasting(content):
                key = cache_key("probe", trial.setup.key, task.treatment, one.name, str(task.every))
                cache.put(key, content)
            found.append(content)
        return found


def _is_lasting(probes: Sequence[Mapping[str, Any]]) -> bool:
    """Not the fault of a pass, or of what it ran on: that may be mended, and is tried again."""
    return not any((one["reason"] or "").startswith(RAISED) for one in probes)


@contextmanager
def shared_folder(shared: str | bytes) -> Iterator[Path]:
    """The folder of a trial: where it lies, or where it is unpacked for as long as needed."""
    if isinstance(shared, str):
        yield Path(shared)
        return
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        yield unpacked(shared, Path(folder))


def _probes(
    trial: Trial, task: Task, layer: Layer, estimates: Mapping[str, Estimate]
) -> list[Probe]:
    """Each option of a layer: tried, or estimated by one that was."""
    method = treatment(task.treatment)
    tried = method.options if task.every or not estimates else method.probed
    measured = {option: _tried(trial, task.treatment, layer, option) for option in tried}
    found = [
        measured[option] if option in measured else _estimated(option, measured, estimates)
        for option in method.options
    ]
    return [_with_joint_bytes(one, layer, estimates.get(one.option)) for one in found]


def _with_joint_bytes(one: Probe, layer: Layer, estimate: Estimate | None) -> Probe:
    if estimate is None or one.reason is not None:
        return one
    return replace(one, joint_saved_bytes=layer.stored_bytes - estimate.stored_bytes)


def _tried(trial: Trial, name: str, layer: Layer, option: str) -> Probe:
    passes = treatment(name).passes({layer.name: option})
    model, steps = trial.rewritten(passes)
    kept = [step for step in steps if step.kept]
    if not kept:
        told = [step.reason or next((s.reason for s in step.skips), None) for step in steps]
        reason = next((t for t in told if t is not None), "there was nothing to do")
        return Probe(name, layer.name, layer.operator, option, 0, 0.0, None, reason)
    try:
        scores = trial.glanced(model)
    except GraphoptError as error:
        return Probe(name, layer.name, layer.operator, option, 0, 0.0, None, str(error))
    before = trial.base_glanced
    return Probe(
        name,
        layer.name,
        layer.operator,
        option,
        trial.stored_bytes(trial.base) - trial.stored_bytes(model),
        max((scores.divergence or 0.0) - (before.divergence or 0.0), 0.0),
        before.value - scores.value,
    )


def _estimated(
    option: str, measured: Mapping[str, Probe], estimates: Mapping[str, Estimate]
) -> Probe:
    """What an option does that was not tried, by those that were.

    The divergence of outputs is in proportion to the squared error of the layer. By how much, the
    coarsest of those that were tried says most of, as its effect is the farthest from noise.
    """
    usable = [o for o, probe in measured.items() if probe.reason is None and o in estimates]
    first = next(iter(measured.values()))
    if not usable:
        return replace(first, option=option)
    seen = max(usable, key=lambda o: estimates[o].square)
    divergence = math.fsum(measured[o].divergence for o in usable)
    square = math.fsum(estimates[o].square for o in usable)
    wanted = estimates[option]
    return replace(
        measured[seen],
        option=option,
        saved_bytes=measured[seen].saved_bytes + estimates[seen].stored_bytes - wanted.stored_bytes,
        divergence=divergence * wanted.square / max(square, SQUARE_MINIMUM),
        loss=None,
    )
