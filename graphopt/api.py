"""The verbs of graphopt: optimize, validate, bisect, benchmark, inspect, explain."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import loading
from graphopt.benchmark import BenchmarkReport, latency_ratio
from graphopt.benchmark import benchmark as time_models
from graphopt.bisecting import bisect_models, bisect_passes, check_not_random
from graphopt.bisection import Bisection
from graphopt.contract import Context, Effect, Pass
from graphopt.details import Details, look_closely
from graphopt.errors import ModelError, SampleError, SpecError, did_you_mean
from graphopt.explain import Explanation, explain_model
from graphopt.gate import CONVERTED, Gate, interface_of
from graphopt.inspection import Inspection, inspect_model
from graphopt.layer_costs import sizes_of_sample
from graphopt.ledger import Run, Step, size_as_given, size_of, stamp
from graphopt.loading import ModelLike
from graphopt.observe import Observer
from graphopt.operators import other_operators
from graphopt.pipeline import Pipeline
from graphopt.recipes import Plan, plan
from graphopt.recording import Feed, compare, record
from graphopt.requirements import Requirement, parse_requirements, unmet
from graphopt.runtime import Reference, Session
from graphopt.samples import read_samples
from graphopt.scratch import Scratch
from graphopt.signature import signature
from graphopt.subject import (
    RANDOM_SAMPLES_DEFAULT,
    Progress,
    SamplesLike,
    State,
    Subject,
    open_subject,
)
from graphopt.validation import Budget, OutputError, parse_budget, why_over


def _quiet(_: str) -> None:
    """Progress that nobody watches."""


def optimize(
    model: ModelLike,
    *,
    recipe: str | None = None,
    passes: str | Sequence[Pass | str] | None = None,
    samples: SamplesLike | None = None,
    random_samples: int | None = None,
    provider: str = "cpu",
    max_error: str | float | Sequence[str | float] | None = None,
    require: str | None = None,
    state: State = (),
    opset: int | None = None,
    gate_samples: int | None = None,
    strict: bool = False,
    standard_ops_only: bool = False,
    keep_overridable: bool = False,
    drop_training_info: bool = False,
    validate: bool = True,
    benchmark: bool = True,
    threads: int = 1,
    hash_ahead: bool = True,
    details: bool = False,
    progress: Progress = _quiet,
) -> Run:
    """Optimize a model: run passes, keep what the samples prove harmless, measure the result.

    Args:
        model: path, bytes, `onnx.ModelProto` or `ir.Model`; never modified.
        recipe: name of a recipe; `basic` when neither this nor `passes` is given.
        passes: in text form, for example `fold-constants,drop-unused`, or several, as text or
            objects.
        samples: a folder or file of inputs, or an iterable of mappings from input name to array;
            see `graphopt.samples.read_samples`.
        random_samples: draw so many samples from the signature instead. With neither, a few are
            drawn.
        provider: "cpu" or "cuda".
        max_error: budget of lossy passes, `[OUTPUT:]X[METRIC]`, or several.
        require: what must hold in the end, for example `size<=0.3,latency<=0.9`.
        state: pairs of output and input that carry state from sample to sample.
        opset: raise the model to this opset.
        gate_samples: how many samples are kept for the gate alone.
        strict: raise at the first pass that the gate rejects.
        standard_ops_only: reject passes that write operators which ONNX does not define; those
            that the model has already may stay.
        keep_overridable: leave initializers that are also inputs open to callers.
        drop_training_info: drop a training graph instead of refusing the model.
        validate: run the model; without, only the checker and the interface are gates.
        benchmark: time the original against the result.
        threads: intra-op threads of the benchmark.
        hash_ahead: hash external data beside the passes; only `Run.save(reuse_data=True)` does
            without.
        details: in the end also look at sizes and errors by layer, and (with `benchmark`) at the
            kernels of both models; see `graphopt.details`.
        progress: called with a few words on what goes on.

    Returns:
        The run: model, ledger, numerics, benchmark. `run.save(path)` writes the model.

    Raises:
        GraphoptError: the input is at fault, or onnxruntime reads it otherwise than graphopt.
        CheckFailed: `strict`, and a pass was rejected.
    """
    _check_counts(random_samples=random_samples, gate_samples=gate_samples, threads=threads)
    requirements = parse_requirements(require) if require is not None else ()
    budgets = _budgets(max_error)
    chosen = plan(recipe, passes, opset)
    _check_samples_given(chosen, samples, random_samples)
    subject = open_subject(model, provider, validate or benchmark, drop_training_info, progress)
    _check_budgets(budgets, subject.source.model)
    if hash_ahead:
        subject.source.hash_ahead()
    calibration, judged = None, None
    if validate or benchmark or samples is not None or random_samples is not None:
        feed = subject.feed(samples, random_samples, state)
        passes_look = any(p.needs_samples for p in chosen.passes)
        calibration, judged = subject.split(feed, gate_samples, passes_look)
    original = size_as_given(subject.source)
    fresh = partial(subject.working_copy, keep_overridable, validate or benchmark or details)
    working = fresh()
    gate = _gate(subject, working, judged, validate, budgets)
    if standard_ops_only:
        gate.allowed_operators = other_operators(working).keys()
    if subject.source.notes:
        gate.check_read(working, subject.source.notes)
    external_data = subject.source.external_data()
    context = Context(
        read_original=lambda: subject.source.model,
        samples=calibration.samples if calibration is not None else (),
        provider=provider,
        progress=progress,
        scratch=Scratch() if external_data else None,
        observer=Observer(calibration, provider) if calibration is not None else None,
    )
    pipeline = Pipeline(working, original, external_data, gate, context, fresh, strict)
    if benchmark and validate and judged is not None:
        pipeline.clock = partial(latency_ratio, samples=judged.samples, provider=provider)
    pipeline.run(chosen)
    stamp(pipeline.model, chosen, subject.source)
    progress("comparing with the original")
    run = Run(
        model=pipeline.model,
        plan=chosen,
        steps=tuple(pipeline.steps),
        original=original,
        optimized=size_of(pipeline.model, external_data),
        numerics=gate.numerics(pipeline.model),
        benchmark=None,
        notes=(*subject.notes, *gate.notes, *_caveats(pipeline.steps, judged)),
        failures=(),
        provider=provider,
        validated=validate,
        source=subject.source,
    )
    if benchmark and judged is not None:
        progress("measuring")
        run = _with_benchmark(run, subject.measure(run.model, judged.samples, threads))
    if details:
        progress("looking at the layers")
        models = {"original": subject.source.model, "optimized": run.model}
        found = look_closely(
            models,
            judged,
            provider=provider,
            threads=threads,
            compares=gate.feed is not None,
            explains=benchmark,
        )
        run = replace(run, details=found)
    return replace(run, failures=_failures(requirements, run))


def _gate(
    subject: Subject,
    working: ir.Model,
    judged: Feed | None,
    validate: bool,
    budgets: tuple[Budget, ...],
) -> Gate:
    if validate:
        subject.tell_of_bodies()
    else:
        subject.notes.append("not validated: passes were not judged by the outputs of the model")
    return Gate(
        interface=interface_of(working),
        given=subject.given,
        feed=judged if validate and not subject.is_random() else None,
        loads=validate,
        checks=subject.source.invalid is None,
        provider=subject.provider,
        budgets=budgets,
    )


def _with_benchmark(run: Run, report: BenchmarkReport) -> Run:
    measured_bytes = report.rows[-1].stored_bytes
    optimized = replace(run.optimized, stored_bytes=measured_bytes)
    return replace(run, benchmark=report, optimized=optimized)


@dataclass(frozen=True)
class Validation:
    """The outputs of one model against those of another.

    Attributes:
        numerics: errors per output, by reference ("as written", "as deployed").
        failure: why they are over the budget as deployed, or None (also without a budget).
        notes: what else a user should know.
        details: sizes and errors by layer; None when not asked for.
    """

    numerics: Mapping[str, tuple[OutputError, ...]]
    failure: str | None
    notes: tuple[str, ...]
    details: Details | None = None

    def _repr_html_(self) -> str:
        """The errors as a table, for notebooks."""
        from graphopt import html_sections

        return html_sections.validation(self)


def validate(
    first: ModelLike,
    second: ModelLike,
    *,
    samples: SamplesLike | None = None,
    random_samples: int | None = None,
    provider: str = "cpu",
    max_error: str | float | Sequence[str | float] | None = None,
    state: State = (),
    details: bool = False,
    progress: Progress = _quiet,
) -> Validation:
    """Compare the outputs of two models on samples, as written and as deployed.

    Args:
        first: the reference.
        second: the model that is compared with it.
        samples: see `optimize`.
        random_samples: see `optimize`.
        provider: "cpu" or "cuda".
        max_error: budgets to judge the second model by.
        state: see `optimize`.
        details: also look at sizes and errors by layer; see `graphopt.details`.
        progress: see `optimize`.

    Raises:
        GraphoptError: a model does not load, or a sample does not fit.
    """
    _check_counts(random_samples=random_samples)
    budgets = _budgets(max_error)
    reference = open_subject(first, provider, True, False, progress)
    compared = open_subject(second, provider, True, False, progress)
    _check_budgets(budgets, reference.source.model)
    _check_inputs(reference, compared)
    feed = reference.feed(samples, random_samples, state)
    numerics = {}
    for how in Reference:
        progress(f"running both {how.value}")
        recorded = record(feed.run(Session(reference.given, how, provider=provider)))
        steps = feed.run(Session(compared.given, how, provider=provider))
        (numerics[how.value],) = compare(steps, [recorded])
    failure = None
    if budgets:
        failure = why_over(Effect.LOSSY, numerics[Reference.AS_DEPLOYED.value], budgets)
    notes = (*reference.notes, *compared.notes, *_converted(reference, compared))
    closer = None
    if details:
        progress("looking at the layers")
        models = {"first": reference.source.model, "second": compared.source.model}
        closer = look_closely(models, feed, provider=provider, explains=False)
    return Validation(numerics, failure, notes, closer)


def bisect(
    original: ModelLike,
    optimized: ModelLike | None = None,
    *,
    recipe: str | None = None,
    passes: str | Sequence[Pass | str] | None = None,
    samples: SamplesLike | None = None,
    random_samples: int | None = None,
    provider: str = "cpu",
    max_error: str | float | Sequence[str | float] | None = None,
    state: State = (),
    progress: Progress = _quiet,
) -> Bisection:
    """Find the pass, and the node, that makes a model wrong, and the smallest model that shows it.

    Give what became of the model, or the passes to run on it. Passes run one by one; nothing is
    rolled back, and no pass narrows itself. All samples judge.

    Args:
        original: the model that is right; see `optimize`.
        optimized: the model that is wrong.
        recipe: see `optimize`.
        passes: see `optimize`.
        samples: see `optimize`.
        random_samples: see `optimize`.
        provider: "cpu" or "cuda".
        max_error: budget of lossy passes, or of `optimized`, which must equal the original but for
            rounding where none is given.
        state: see `optimize`.
        progress: see `optimize`.

    Raises:
        GraphoptError: the input is at fault, or a model is random, so that nothing can be told.
    """
    _check_counts(random_samples=random_samples)
    budgets = _budgets(max_error)
    if (optimized is None) == (recipe is None and passes is None):
        raise SpecError("give either a second model, or the passes or the recipe to run")
    subject = open_subject(original, provider, True, False, progress)
    check_not_random(subject)
    _check_budgets(budgets, subject.source.model)
    if optimized is not None:
        compared = open_subject(optimized, provider, True, False, progress)
        check_not_random(compared)
        _check_inputs(subject, compared)
        feed = subject.feed(samples, random_samples, state)
        return bisect_models(subject, compared, feed, budgets, progress)
    chosen = plan(recipe, passes, None)
    _check_samples_given(chosen, samples, random_samples)
    feed = subject.feed(samples, random_samples, state)
    calibration, _ = feed.split()
    return bisect_passes(subject, chosen, feed, calibration, budgets, progress)


def benchmark(
    models: Sequence[ModelLike],
    *,
    samples: SamplesLike | None = None,
    random_samples: int | None = None,
    provider: str = "cpu",
    threads: int = 1,
    batch_size: int | None = None,
    progress: Progress = _quiet,
) -> BenchmarkReport:
    """Time models against each other, interleaved, each as onnxruntime runs it by default.

    Args:
        models: the first is what the ratios of the others refer to.
        samples: inputs that fit all of them; see `optimize`.
        random_samples: see `optimize`.
        provider: "cpu" or "cuda".
        threads: intra-op threads.
        batch_size: at which to measure throughput; by default that of the samples.
        progress: see `optimize`.

    Raises:
        GraphoptError: a model does not load, or a sample does not fit.
    """
    _check_counts(random_samples=random_samples, threads=threads, batch_size=batch_size)
    subjects = [open_subject(m, provider, True, False, progress) for m in models]
    if not subjects:
        raise ModelError("there is no model to time; give one or more")
    for other in subjects[1:]:
        _check_inputs(subjects[0], other)
    feed = subjects[0].feed(samples, random_samples, ())
    progress("measuring")
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        labels = _labels([str(s.source.path or "in memory") for s in subjects])
        files = [
            (label, s.file(Path(folder) / f"{n}.onnx"))
            for n, (label, s) in enumerate(zip(labels, subjects, strict=True))
        ]
        return time_models(
            files, samples=feed.samples, provider=provider, threads=threads, batch_size=batch_size
        )


def explain(
    model: ModelLike,
    *,
    samples: SamplesLike | None = None,
    random_samples: int | None = None,
    provider: str = "cpu",
    threads: int = 1,
    progress: Progress = _quiet,
) -> Explanation:
    """In which kernels onnxruntime runs a model, what they take, and why it is not less.

    Args:
        model: see `optimize`.
        samples: see `optimize`; what a stateful model carries from run to run is zeros where the
            samples lack it.
        random_samples: see `optimize`.
        provider: "cpu" or "cuda".
        threads: intra-op threads.
        progress: see `optimize`.

    Raises:
        GraphoptError: the model does not load, or a sample does not fit.
    """
    _check_counts(random_samples=random_samples, threads=threads)
    subject = open_subject(model, provider, True, True, progress)
    # Those of `feed` are about judging outputs, which are not looked at here.
    notes = list(subject.notes)
    if samples is None and random_samples is None:
        random_samples = RANDOM_SAMPLES_DEFAULT
        notes.append(f"no samples were given: run on {random_samples} random ones")
    feed = subject.feed(samples, random_samples, ())
    progress("profiling")
    return explain_model(
        subject.source.model,
        feed.samples,
        provider=provider,
        threads=threads,
        notes=tuple(notes),
    )


def inspect(
    model: ModelLike,
    *,
    sizes: Mapping[str, int] | None = None,
    samples: SamplesLike | None = None,
    progress: Progress = _quiet,
) -> tuple[Inspection, Run]:
    """What is in a model, and what the recipe `basic` would do to it.

    Args:
        model: see `optimize`.
        sizes: of dimensions of inputs that the file leaves open, to count multiply-accumulates at:
            by name (`batch`), or by input and axis (`image[0]`). Others count 1.
        samples: see `optimize`; the first one has the sizes that `sizes` does not give.
        progress: see `optimize`.

    Raises:
        SpecError: a size is of no such dimension, or below 0.
        GraphoptError: the model cannot be read, or a sample does not fit.
    """
    progress("looking at the model")
    loaded = loading.load(model, drop_training_info=True)
    first = {} if samples is None else next(iter(read_samples(samples, signature(loaded))))
    found = inspect_model(loaded, {**sizes_of_sample(loaded, first), **(sizes or {})})
    progress("trying basic")
    tried = optimize(
        model, recipe="basic", validate=False, benchmark=False, drop_training_info=True
    )
    return found, tried


# ------------------------------------------------------------------ what the verbs share


def _labels(names: Sequence[str]) -> list[str]:
    """The names, told apart where one comes again: results are looked up by them."""
    again = [names[:n].count(name) for n, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, again, strict=True)]


COUNT_MAXIMUM = 1 << 20
"""More samples, threads or rows of a batch than this are a slip of the keyboard."""


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is None:
            continue
        if not isinstance(count, int):
            raise SpecError(f"{name} is {count!r}; it must be a whole number")
        if not 1 <= count <= COUNT_MAXIMUM:
            raise SpecError(f"{name} is {count}; it must be from 1 to {COUNT_MAXIMUM}")


def _budgets(max_error: str | float | Sequence[str | float] | None) -> tuple[Budget, ...]:
    if max_error is None:
        return ()
    if isinstance(max_error, str | float | int):
        max_error = [max_error]
    return tuple(parse_budget(str(budget)) for budget in max_error)


def _check_samples_given(
    chosen: Plan, samples: SamplesLike | None, random_samples: int | None
) -> None:
    needy = [p.name for p in chosen.passes if p.needs_samples]
    if needy and samples is None and random_samples is None:
        raise SampleError(f"{needy[0]} needs samples; give --samples, or --random-samples N")


def _check_budgets(budgets: Sequence[Budget], model: ir.Model) -> None:
    names = [o.name or "" for o in model.graph.outputs]
    for budget in budgets:
        # An element of an output that is a sequence or map is called `name[key]`.
        if budget.output is None or budget.output in names:
            continue
        if not any(budget.output.startswith(f"{name}[") for name in names):
            near = did_you_mean(budget.output, names)
            raise SpecError(f"budget {budget}: the model has no output {budget.output!r}{near}")


def _check_inputs(first: Subject, other: Subject) -> None:
    """Raise ModelError when samples of the first model cannot serve the other too."""
    have = {i.name for i in signature(first.source.model)}
    missing = [i.name for i in signature(other.source.model) if i.required and i.name not in have]
    if missing:
        named = str(other.source.path or "the other model")
        raise ModelError(
            f"{named} has an input {missing[0]!r}, and the first model has only "
            f"{', '.join(map(repr, sorted(have)))}: the models must take the same inputs"
        )


def _converted(first: Subject, other: Subject) -> Iterator[str]:
    """What is said of outputs that are compared although their types differ."""
    types = {o.name: o.dtype for o in first.source.model.graph.outputs}
    for output in other.source.model.graph.outputs:
        old, new = types.get(output.name), output.dtype
        if old is None or new is None or old == new or not {old.name, new.name} <= CONVERTED:
            continue
        was, now = (np.dtype(kind.numpy()).name for kind in (old, new))
        yield f"output {output.name!r} is {now} and was {was}: compared as {was}"


def _caveats(steps: Sequence[Step], judged: Feed | None) -> list[str]:
    lossy = any(s.kept and s.effect is Effect.LOSSY for s in steps)
    if lossy and judged is not None and judged.samples.random:
        return ["budget not verified on real data: the samples are random"]
    return []


def _failures(requirements: Sequence[Requirement], run: Run) -> tuple[str, ...]:
    lossy = [s for s in run.steps if s.effect is Effect.LOSSY]
    kept_none = lossy and not any(s.kept for s in lossy)
    none_kept = ("none of the lossy passes was kept",) if kept_none else ()
    return (*unmet(requirements, run), *none_kept)
