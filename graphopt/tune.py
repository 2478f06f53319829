"""tune: the best model within a drop of the metric, searched for, and verified on other samples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import loading
from graphopt.contract import Effect
from graphopt.details import look_closely
from graphopt.errors import SampleError, SpecError
from graphopt.executors import open_workers
from graphopt.gate import Gate, interface_of
from graphopt.kept_models import kept_models
from graphopt.ledger import Run, Step, size_as_given, size_of, stamp
from graphopt.loading import ModelLike
from graphopt.metric import parse_metric
from graphopt.pace import latency_over, seconds_per_sample, share_of_samples
from graphopt.parting import Parts
from graphopt.preparing import lossless
from graphopt.probe_cache import ProbeCache, default_folder
from graphopt.probing import Probe
from graphopt.recipes import plan, recipe
from graphopt.recording import Feed
from graphopt.requirements import parse_requirements, unmet
from graphopt.rewriting import replace_tensors, tensor_of
from graphopt.scenarios import Scenario, scenario, scenario_for
from graphopt.scratch import Scratch
from graphopt.search import Search
from graphopt.subject import Progress, SamplesLike, State, open_subject
from graphopt.verifying import Certificate, Taken
from graphopt.yardstick import measured_by, parse_allowed_drop

GATE_SAMPLES = 16
"""On so many of the samples to verify by, at most, outputs are compared number by number."""


@dataclass(frozen=True)
class Point:
    """A model that was built in the search, or that is expected to be on the front.

    Attributes:
        name: of its trunk.
        passes: all that was done after the recipe basic, in text form; empty where not built.
        size_ratio: bytes on disk over those of the original.
        latency_ratio: to the original's, or None where not measured.
        drop: estimated, in the unit of the metric.
        built: it was built and judged; else it is expected.
        chosen: it is the one that was taken.
        options: what its layers got, "treatment option" by their names; the others are as in its
            trunk.
    """

    name: str
    passes: str
    size_ratio: float
    latency_ratio: float | None
    drop: float
    built: bool
    chosen: bool
    options: Mapping[str, str]


@dataclass(frozen=True)
class Tuning:
    """The result of `graphopt.tune`.

    Attributes:
        run: the model and its evidence, as of `graphopt.optimize`; `run.save(path)` writes it.
        scenario: its name, or the objective.
        objective: what was made least.
        metric: its name.
        unit: of the metric, "%" or empty.
        certificate: what samples that the search never saw say of it.
        points: what was built, and the front that was expected.
        probes: what each option does to each layer alone, of the trunk that was taken.
        parts: how many samples were fitted, searched and verified by.
        evaluations: how often a model was run on one of the latter two.
        minutes: that it took.
        notes: what else a user should know, beside those of the run.
        certify: only what is proven was to be taken.
    """

    run: Run
    scenario: str
    objective: str
    metric: str
    unit: str
    certificate: Certificate
    points: tuple[Point, ...]
    probes: tuple[Probe, ...]
    parts: tuple[int, int, int]
    evaluations: int
    minutes: float
    notes: tuple[str, ...]
    certify: bool

    @property
    def chosen(self) -> Point | None:
        """The point that was taken; None where it is the model after lossless passes."""
        return next((one for one in self.points if one.chosen), None)

    @property
    def proves_enough(self) -> bool:
        """What was to be proven is; a result that does not is not to be written."""
        return self.certificate.certified or not self.certify

    def save(self, path: str | Path) -> Tuning:
        """Write the model; see `Run.save`."""
        return replace(self, run=self.run.save(path))

    def _repr_html_(self) -> str:
        """What was found as tables, for notebooks."""
        from graphopt import html_sections

        return html_sections.tuning(self)


def tune(
    model: ModelLike,
    *,
    samples: SamplesLike,
    max_drop: float | str,
    metric: str | None = None,
    labels: str | Path | None = None,
    scenario: str | None = None,
    objective: str | None = None,
    provider: str | None = None,
    confidence: float = 0.95,
    certify: bool = False,
    budget_minutes: float = 10.0,
    threads: int = 1,
    seed: int = 0,
    state: State = (),
    cache: str | Path | None = None,
    executor: str | Executor | None = None,
    jobs: int | None = None,
    require: str | None = None,
    details: bool = False,
    progress: Progress = lambda _: None,
) -> Tuning:
    """Find the model of the least size, latency or memory within a drop of the metric.

    Args:
        model: see `graphopt.optimize`.
        samples: likewise. They are parted: to fit by, to search by, and to verify by.
        max_drop: of the metric, in its unit; `"2%"` is of the original's value.
        metric: see `graphopt.metric.parse_metric`; by default accuracy where there are labels, else
            agreement with the original.
        labels: path of a file of labels; by default labels.json in the folder of the samples.
        scenario: its name; by default that of the objective and the provider.
        objective: "size", "latency" or "memory"; by default that of the scenario, or size.
        provider: "cpu" or "cuda"; by default that of the scenario, or cpu.
        confidence: of what is said of the drop.
        certify: take only what is proven to be within the drop (Learn then Test, arXiv
            2110.01052); where nothing is, the result is the model after lossless passes, with a
            failure, and is not for use.
        budget_minutes: about how long it may take.
        threads: of the benchmark.
        seed: of another parting of the samples.
        state: see `graphopt.optimize`.
        cache: folder of what was found before; by default the user's folder for caches.
        executor: see `graphopt.executors.open_workers`.
        jobs: processes, of the default executor.
        require: what must hold in the end, for example `size<=0.3,latency<=0.9`.
        details: in the end also look at sizes and errors by layer, and at the kernels of both
            models; see `graphopt.details`.
        progress: called with a few words on what goes on.

    Returns:
        The model, in `run`, and all that was found on the way. `run.failures` says where nothing
        but the model after lossless passes is within the drop, or a requirement does not hold.

    Raises:
        SpecError: an option does not fit, or there is no such scenario, objective or metric.
        SearchStopped: a worker was lost, or there is no room; what was found is kept.
        GraphoptError: the input is at fault.
    """
    started_s = time.monotonic()
    allowed = parse_allowed_drop(max_drop)
    requirements = parse_requirements(require) if require is not None else ()
    _check(confidence, budget_minutes)
    store = ProbeCache(Path(cache) if cache is not None else default_folder())
    store.check()
    named, chosen = _scenario(scenario, objective, provider)
    asked = parse_metric(metric, samples if isinstance(samples, str | Path) else None, labels)
    subject = open_subject(model, chosen.provider, True, True, progress)
    if subject.is_random():
        raise SampleError("the model is random: no drop can be measured of it")
    feed = subject.feed(samples, None, state)
    progress("the original")
    sample_s = seconds_per_sample(subject, feed, store)
    share = share_of_samples(sample_s, 60 * budget_minutes)
    by = measured_by(subject, feed, asked, metric is None, allowed, 1 - confidence, seed, share)
    base, base_steps = lossless(subject, progress)
    with (
        tempfile.TemporaryDirectory(prefix="graphopt-") as folder,
        kept_models(store.folder, subject.source.sha256()) as models,
        open_workers(executor, jobs) as workers,
    ):
        search = Search(
            subject=subject,
            base=base,
            scenario=chosen,
            limit=by.aim,
            parts=by.parts,
            gauge=by.gauge,
            folder=Path(folder),
            models=models,
            workers=workers,
            cache=store,
            latency=lambda path: latency_over(subject, path, by.parts.judged, store),
            seconds=60 * budget_minutes,
            sample_s=sample_s,
            progress=progress,
            sureness=by.sureness,
        )
        if share < 1 and by.parts.capped:
            search.notes.append(_why_fewer(sample_s, by.parts))
        search.run()
        progress("verifying")
        verifier = by.verifier(search)
        taken, certificate = verifier.by_proof() if certify else verifier.by_estimate()
        run = _run(search, taken, base_steps, threads, details)
        reasons = _failures(run, certify, certificate, by.unit)
        run = replace(run, failures=(*reasons, *unmet(requirements, run)))
    return Tuning(
        run=run,
        scenario=named,
        objective=chosen.objective,
        metric=by.metric,
        unit=by.unit,
        certificate=certificate,
        points=tuple(_points(search, taken)),
        probes=tuple(_probes(search, taken)),
        parts=by.parts.counts,
        evaluations=by.gauge.evaluations + verifier.evaluations,
        minutes=(time.monotonic() - started_s) / 60,
        notes=tuple(search.notes),
        certify=certify,
    )


# ------------------------------------------------------------------ what is asked for


def _check(confidence: float, budget_minutes: float) -> None:
    if not 0 < confidence < 1:
        raise SpecError(f"confidence is {confidence:g}; it must be between 0 and 1, as 0.95")
    if not budget_minutes > 0:
        raise SpecError(f"budget_minutes is {budget_minutes:g}; it must be above 0")


def _scenario(
    name: str | None, objective: str | None, provider: str | None
) -> tuple[str, Scenario]:
    if name is None:
        objective = objective or "size"
        return objective, scenario_for(objective, provider or "cpu")
    found = scenario(name)
    if objective not in (None, found.objective):
        raise SpecError(f"the scenario {name!r} is for {found.objective}, and not for {objective}")
    if provider not in (None, found.provider):
        raise SpecError(f"the scenario {name!r} is for {found.provider}, and not for {provider}")
    return name, found


def _why_fewer(sample_s: float, parts: Parts) -> str:
    fitted, judged, _ = parts.counts
    return (
        f"a sample takes {1000 * sample_s:.3g} ms: there is time to fit by {fitted} and to search "
        f"by {judged} of them; more --budget-minutes help"
    )


# ------------------------------------------------------------------ what comes out


def _run(
    search: Search,
    taken: Taken | None,
    base_steps: Sequence[Step],
    threads: int,
    details: bool,
) -> Run:
    """The model that was taken, with its evidence; the lossless one where none was."""
    subject, judged = search.subject, search.parts.verified
    model, texts, steps = search.base.clone(), [recipe("basic").passes], list(base_steps)
    if taken is not None:
        # Its files go when the search ends.
        model = loading.load(taken.built.path)
        replace_tensors(model, partial(_taken_over, Scratch()))
        texts.append(taken.candidate.passes)
        steps += [*search.trunk_of(taken.candidate).built.steps, *taken.built.steps]
    external_data = subject.source.external_data()
    chosen = plan(None, ",".join(filter(None, texts)), None)
    few = Feed(judged.samples.first(GATE_SAMPLES), judged.inputs, judged.state)
    gate = Gate(interface_of(search.base), subject.given, few, provider=subject.provider)
    stamp(model, chosen, subject.source)
    search.progress("measuring")
    report = subject.measure(model, few.samples, threads)
    closer = None
    if details:
        search.progress("looking at the layers")
        models = {"original": subject.source.model, "optimized": model}
        closer = look_closely(models, few, provider=subject.provider, threads=threads)
    return Run(
        model=model,
        plan=chosen,
        steps=tuple(steps),
        original=size_as_given(subject.source),
        optimized=size_of(model, external_data),
        numerics=gate.numerics(model),
        benchmark=report,
        notes=(*subject.notes, *gate.notes),
        failures=(),
        provider=subject.provider,
        validated=True,
        source=subject.source,
        details=closer,
    )


def _failures(run: Run, certify: bool, certificate: Certificate, unit: str) -> Iterator[str]:
    """Why a user does not get what a search is for."""
    limit = drop_text(certificate.limit, unit)
    if certify and not certificate.certified:
        yield f"no model is proven to lose at most {limit}: {certificate.reason}"
    elif not any(step.kept and step.effect is Effect.LOSSY for step in run.steps):
        yield (
            f"no lossy model was found that loses at most {limit}: the result is what lossless "
            "passes make"
        )


def drop_text(drop: float, unit: str) -> str:
    """A drop in words: of a metric in per cent, points."""
    return f"{drop:.3g}" if unit != "%" else f"{drop:.3g} point{'' if drop == 1 else 's'}"


def _taken_over(scratch: Scratch, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same tensor; one in a file that is about to go in another, or in memory."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    kept = scratch.keep(tensor)
    if kept is not tensor:
        return kept
    return tensor_of(np.array(tensor.numpy()), tensor.name or "", tensor.dtype)


def _probes(search: Search, taken: Taken | None) -> Sequence[Probe]:
    """Of the trunk that was taken; where none was, of the last one that was gone on with."""
    if taken is not None:
        return search.probes.get(taken.candidate.trunk, [])
    return next(reversed(search.probes.values()), [])


def _points(search: Search, taken: Taken | None) -> Iterator[Point]:
    original_bytes = search.subject.source.stored_bytes
    for one in search.candidates:
        yield Point(
            one.trunk,
            one.passes,
            one.built.stored_bytes / original_bytes,
            one.latency_ratio,
            one.gauged.drop,
            built=True,
            chosen=taken is not None and one is taken.candidate,
            options=one.chosen,
        )
    for expected in search.predicted:
        ratio = expected.stored_bytes / original_bytes
        yield Point(
            expected.trunk,
            "",
            ratio,
            None,
            expected.drop,
            built=False,
            chosen=False,
            options={},
        )
