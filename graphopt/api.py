"""The verbs of graphopt: optimize, validate, benchmark, inspect."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from graphopt import model_io, runtime
from graphopt import samples as sampling
from graphopt.benchmark import BenchmarkReport
from graphopt.benchmark import benchmark as time_models
from graphopt.contract import Context, Effect, Pass, Sample
from graphopt.errors import ModelError, SampleError, SpecError, did_you_mean
from graphopt.gate import Gate, interface_of
from graphopt.inspection import Inspection, inspect_model
from graphopt.ledger import Run, Size, Step, size_of, stamp
from graphopt.model_io import ModelLike, Source
from graphopt.operators import all_graphs, is_random
from graphopt.pipeline import Pipeline
from graphopt.recipes import Plan, plan
from graphopt.recording import Feed, compare, record
from graphopt.requirements import Requirement, parse_requirements
from graphopt.runtime import Reference, Session
from graphopt.samples import Samples
from graphopt.state import guess_state
from graphopt.validation import Budget, OutputError, parse_budget, why_over

RANDOM_SAMPLES_DEFAULT = 4

SamplesLike = str | Path | Iterable[Sample]
State = Sequence[tuple[str, str]]
Progress = Callable[[str], None]


def _quiet(_: str) -> None:
    """Progress that nobody watches."""


def optimize(
    model: ModelLike,
    *,
    recipe: str | None = None,
    passes: str | Sequence[Pass] | None = None,
    samples: SamplesLike | None = None,
    random_samples: int | None = None,
    provider: str = "cpu",
    max_error: str | float | Sequence[str] | None = None,
    require: str | None = None,
    state: State = (),
    opset: int | None = None,
    gate_samples: int | None = None,
    strict: bool = False,
    keep_overridable: bool = False,
    drop_training_info: bool = False,
    validate: bool = True,
    benchmark: bool = True,
    threads: int = 1,
    progress: Progress = _quiet,
) -> Run:
    """Optimize a model: run passes, keep what the samples prove harmless, measure the result.

    Args:
        model: path, bytes, `onnx.ModelProto` or `ir.Model`; never modified.
        recipe: name of a recipe; `basic` when neither this nor `passes` is given.
        passes: in text form, for example `fold-constants,drop-unused`, or as objects.
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
        keep_overridable: leave initializers that are also inputs open to callers.
        drop_training_info: drop a training graph instead of refusing the model.
        validate: run the model; without, only the checker and the interface are gates.
        benchmark: time the original against the result.
        threads: intra-op threads of the benchmark.
        progress: called with a few words on what goes on.

    Returns:
        The run: model, ledger, numerics, benchmark. `run.save(path)` writes the model.

    Raises:
        GraphoptError: the input is at fault.
        CheckFailed: `strict`, and a pass was rejected.
    """
    requirements = parse_requirements(require) if require is not None else ()
    budgets = _budgets(max_error)
    chosen = plan(recipe, passes, opset)
    _check_samples_given(chosen, samples, random_samples)
    runs = validate or benchmark
    subject = _open(model, provider, runs, drop_training_info, progress)
    _check_budgets(budgets, subject.source.model)
    notes = list(subject.source.notes)
    working = subject.source.model.clone()
    model_io.allow_new_initializers(working)
    if not keep_overridable:
        notes += _freeze(working)
    feed = None
    if runs or samples is not None or random_samples is not None:
        feed = subject.feed(samples, random_samples, state, notes)
    calibration, judged = feed.split(gate_samples) if feed is not None else (None, None)
    if judged is not None and judged is calibration:
        notes.append(f"{len(judged.samples)} samples serve both passes and gate: too few to split")
    gate = Gate(
        interface=interface_of(working),
        given=subject.given,
        feed=judged if validate and not _is_random(working, notes) else None,
        loads=validate,
        checks=subject.source.invalid is None,
        provider=provider,
        budgets=budgets,
    )
    if not validate:
        notes.append("not validated: passes were not judged by the outputs of the model")
    context = Context(
        original=subject.source.model,
        samples=calibration.samples if calibration is not None else (),
        provider=provider,
        progress=progress,
    )
    original = size_of(subject.source.model, subject.source.stored_bytes)
    pipeline = Pipeline(working, original, gate, context, strict)
    pipeline.run(chosen)
    progress("comparing with the original")
    digest = subject.source.sha256()
    stamp(pipeline.model, chosen, digest)
    optimized = size_of(pipeline.model)
    numerics = gate.numerics(pipeline.model)
    report = None
    if benchmark and judged is not None:
        progress("measuring")
        report = subject.measure(pipeline.model, judged.samples, threads)
        optimized = replace(optimized, stored_bytes=report.rows[-1].stored_bytes)
    return Run(
        model=pipeline.model,
        plan=chosen,
        steps=tuple(pipeline.steps),
        original=original,
        optimized=optimized,
        numerics=numerics,
        benchmark=report,
        notes=(*notes, *_caveats(pipeline.steps, judged)),
        failures=_failures(requirements, pipeline.steps, original, optimized, numerics, report),
        input_sha256=digest,
        provider=provider,
        validated=validate,
        source_path=subject.source.path,
    )


@dataclass(frozen=True)
class Validation:
    """The outputs of one model against those of another.

    Attributes:
        numerics: errors per output, by reference ("as written", "as deployed").
        failure: why they are over the budget as deployed, or None (also without a budget).
        notes: what else a user should know.
    """

    numerics: Mapping[str, tuple[OutputError, ...]]
    failure: str | None
    notes: tuple[str, ...]


def validate(
    first: ModelLike,
    second: ModelLike,
    *,
    samples: SamplesLike | None = None,
    random_samples: int | None = None,
    provider: str = "cpu",
    max_error: str | float | Sequence[str] | None = None,
    state: State = (),
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
        progress: see `optimize`.

    Raises:
        GraphoptError: a model does not load, or a sample does not fit.
    """
    budgets = _budgets(max_error)
    reference = _open(first, provider, True, False, progress)
    compared = _open(second, provider, True, False, progress)
    _check_budgets(budgets, reference.source.model)
    _check_inputs(reference, compared)
    notes: list[str] = []
    feed = reference.feed(samples, random_samples, state, notes)
    numerics = {}
    for how in Reference:
        progress(f"running both {how.value}")
        recorded = record(feed.run(Session(reference.given, how, provider=provider)))
        steps = feed.run(Session(compared.given, how, provider=provider))
        (numerics[how.value],) = compare(steps, [recorded])
    failure = None
    if budgets:
        failure = why_over(Effect.LOSSY, numerics[Reference.AS_DEPLOYED.value], budgets)
    return Validation(numerics, failure, tuple(notes))


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
    subjects = [_open(m, provider, True, False, progress) for m in models]
    if not subjects:
        raise ModelError("there is no model to time; give one or more")
    for other in subjects[1:]:
        _check_inputs(subjects[0], other)
    feed = subjects[0].feed(samples, random_samples, (), [])
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


def inspect(model: ModelLike, *, progress: Progress = _quiet) -> tuple[Inspection, Run]:
    """What is in a model, and what the recipe `basic` would do to it.

    Raises:
        GraphoptError: the model cannot be read.
    """
    progress("looking at the model")
    found = inspect_model(model_io.load(model, drop_training_info=True))
    progress("trying basic")
    tried = optimize(
        model, recipe="basic", validate=False, benchmark=False, drop_training_info=True
    )
    return found, tried


# ------------------------------------------------------------------ what the verbs share


@dataclass(frozen=True)
class _Subject:
    """A model as it was given, ready to be run.

    Attributes:
        source: as loaded.
        given: what onnxruntime is to load: the file itself where there is one.
        provider: "cpu" or "cuda".
    """

    source: Source
    given: ir.Model | Path
    provider: str

    def feed(
        self,
        samples: SamplesLike | None,
        random_samples: int | None,
        state: State,
        notes: list[str],
    ) -> Feed:
        """The samples that were asked for, checked against the model."""
        if samples is not None and random_samples is not None:
            raise SampleError("give samples or a number of random samples, not both")
        inputs = sampling.signature(self.source.model)
        _check_state(self.source.model, state)
        if samples is not None:
            if not state:
                state, samples = _guessed_state(self.source.model, samples, notes)
            return Feed(sampling.read_samples(samples, inputs, state), inputs, tuple(state))
        count = random_samples if random_samples is not None else RANDOM_SAMPLES_DEFAULT
        if random_samples is None:
            notes.append(f"no samples were given: judged on {count} random ones")
        return Feed(self._draw(count), inputs, tuple(state))

    def _draw(self, count: int) -> Samples:
        session = Session(self.given, provider=self.provider)
        reason = ""

        def accepts(sample: Sample) -> bool:
            nonlocal reason
            try:
                session.run(sample)
            except SampleError as error:
                reason = str(error)
                return False
            return True

        try:
            drawn = sampling.random_samples(self.source.model, count, accepts)
        except SampleError as error:
            raise SampleError(f"{error}: {reason}" if reason else str(error)) from None
        read = sampling.read_samples(drawn, sampling.signature(self.source.model))
        return replace(read, random=True)

    def file(self, path: Path) -> Path:
        """The file of the model; one is written at `path` when it was given in memory."""
        if isinstance(self.given, Path):
            return self.given
        model_io.save(self.given, path)
        return path

    def measure(self, result: ir.Model, samples: Samples, threads: int) -> BenchmarkReport:
        """Time the model against a result, both from files, as a user would load them."""
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            before = self.file(Path(folder) / "original.onnx")
            after = Path(folder) / "optimized.onnx"
            model_io.save(result, after)
            models = [("original", before), ("optimized", after)]
            return time_models(models, samples=samples, provider=self.provider, threads=threads)


def _open(
    model: ModelLike, provider: str, runs: bool, drop_training_info: bool, progress: Progress
) -> _Subject:
    """Load a model; where it is going to be run, let onnxruntime load it as given first."""
    if runs:
        runtime.check_provider(provider)
    progress("loading")
    source = model_io.open_model(model, drop_training_info=drop_training_info)
    given = source.path or source.model.clone()
    if not runs:
        if source.invalid is not None:
            raise ModelError(source.invalid)
        return _Subject(source, given, provider)
    try:
        Session(given, Reference.AS_DEPLOYED, provider=provider)
    except ModelError as error:
        reason = _why_not_loaded(str(error), source.model)
        raise ModelError(f"onnxruntime does not load the model as given: {reason}") from None
    if source.invalid is not None:
        note = (
            f"the onnx checker rejects the model as given ({source.invalid}), but onnxruntime "
            "loads it: the checker is left out of the gate"
        )
        source = replace(source, notes=(*source.notes, note))
    return _Subject(source, given, provider)


def _why_not_loaded(reason: str, model: ir.Model) -> str:
    """Onnxruntime's reason without the path, which the user knows, and what it leaves unsaid."""
    if reason.startswith("Load model from"):
        reason = reason.partition(" failed:")[2] or reason
    if "is not a registered function/op" in reason:
        domains = {node.domain for graph in all_graphs(model) for node in graph} - {""}
        reason += (
            f" (the model uses operators of {', '.join(sorted(domains))}; those of a library of "
            "custom operators cannot be run here)"
        )
    return reason


def _labels(names: Sequence[str]) -> list[str]:
    """The names, told apart where one comes again: results are looked up by them."""
    again = [names[:n].count(name) for n, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, again, strict=True)]


def _budgets(max_error: str | float | Sequence[str] | None) -> tuple[Budget, ...]:
    if max_error is None:
        return ()
    if isinstance(max_error, str | float | int):
        max_error = [str(max_error)]
    return tuple(parse_budget(text) for text in max_error)


def _check_samples_given(
    chosen: Plan, samples: SamplesLike | None, random_samples: int | None
) -> None:
    needy = [p.name for p in chosen.passes if p.needs_samples]
    if needy and samples is None and random_samples is None:
        raise SampleError(f"{needy[0]} needs samples; give --samples, or --random-samples N")


def _check_state(model: ir.Model, state: State) -> None:
    outputs = {o.name or "": o for o in model.graph.outputs}
    inputs = {i.name or "": i for i in model.graph.inputs}
    for output, name in state:
        what = f"state {output}={name}"
        if output not in outputs:
            near = did_you_mean(output, outputs)
            raise SampleError(f"{what}: the model has no output {output!r}{near}")
        if name not in inputs:
            near = did_you_mean(name, inputs)
            raise SampleError(f"{what}: the model has no input {name!r}{near}")
        made, taken = outputs[output], inputs[name]
        if made.type != taken.type:
            raise SampleError(
                f"{what}: the output is a {made.type} and the input a {taken.type}; state needs "
                "one type"
            )
        if not _may_equal(made.shape, taken.shape):
            raise SampleError(
                f"{what}: the output has shape {made.shape} and the input {taken.shape}; state "
                "needs one shape"
            )
    if len({name for _, name in state}) < len(state):
        raise SampleError("an input can take its state from one output only; one is given twice")


def _may_equal(first: ir.Shape | None, second: ir.Shape | None) -> bool:
    """No dimension of the two is known to be different."""
    if first is None or second is None:
        return True
    known = [(a, b) for a, b in zip(first, second, strict=False)]
    unequal = any(a != b for a, b in known if isinstance(a, int) and isinstance(b, int))
    return len(first) == len(second) and not unequal


def _check_budgets(budgets: Sequence[Budget], model: ir.Model) -> None:
    names = [o.name or "" for o in model.graph.outputs]
    for budget in budgets:
        # An element of an output that is a sequence or map is called `name[key]`.
        if budget.output is None or budget.output in names:
            continue
        if not any(budget.output.startswith(f"{name}[") for name in names):
            near = did_you_mean(budget.output, names)
            raise SpecError(f"budget {budget}: the model has no output {budget.output!r}{near}")


def _check_inputs(first: _Subject, other: _Subject) -> None:
    """Raise ModelError when samples of the first model cannot serve the other too."""
    have = {i.name for i in sampling.signature(first.source.model)}
    missing = [
        i.name for i in sampling.signature(other.source.model) if i.required and i.name not in have
    ]
    if missing:
        named = str(other.source.path or "the other model")
        raise ModelError(
            f"{named} has an input {missing[0]!r}, and the first model has only "
            f"{', '.join(map(repr, sorted(have)))}: the models must take the same inputs"
        )


def _guessed_state(
    model: ir.Model, samples: SamplesLike, notes: list[str]
) -> tuple[State, SamplesLike]:
    """State that the samples leave out, if its names tell where it comes from."""
    guess = guess_state(model)
    if not guess:
        return (), samples
    names, samples = sampling.first_names(samples)
    options = " ".join(f"--state {output}={name}" for output, name in guess)
    if all(name in names for _, name in guess):
        notes.append(f"the model looks stateful; to judge it by roll-outs, give {options}")
        return (), samples
    notes.append(f"the samples leave state out, so they are roll-outs in name order: {options}")
    return guess, samples


def _freeze(model: ir.Model) -> list[str]:
    frozen = model_io.freeze_overridable_inputs(model)
    if not frozen:
        return []
    return [
        f"{len(frozen)} initializers that were also inputs are constants now "
        "(--keep-overridable leaves them open)"
    ]


def _is_random(model: ir.Model, notes: list[str]) -> bool:
    graphs = [*all_graphs(model), *(f.graph for f in model.functions.values())]
    found = sorted({n.op_type for graph in graphs for n in graph if is_random(n)})
    if found:
        notes.append(
            f"the model is random ({', '.join(found)}): judged on structure alone, its outputs "
            "were not compared"
        )
    return bool(found)


def _caveats(steps: Sequence[Step], judged: Feed | None) -> list[str]:
    lossy = any(s.kept and s.effect is Effect.LOSSY for s in steps)
    if lossy and judged is not None and judged.samples.random:
        return ["budget not verified on real data: the samples are random"]
    return []


def _failures(
    requirements: Sequence[Requirement],
    steps: Sequence[Step],
    original: Size,
    optimized: Size,
    numerics: Mapping[str, tuple[OutputError, ...]],
    report: BenchmarkReport | None,
) -> tuple[str, ...]:
    figures: dict[str, float | None] = {
        "size": optimized.stored_bytes / original.stored_bytes,
        "nodes": optimized.nodes / original.nodes if original.nodes else None,
        "latency": report.rows[-1].ratio if report is not None else None,
        "error": max((o.rel_l2 for o in numerics.get("as deployed", ())), default=None),
    }
    reasons = [r.why_failed(figures) for r in requirements]
    lossy = [s for s in steps if s.effect is Effect.LOSSY]
    if lossy and not any(s.kept for s in lossy):
        reasons.append("none of the lossy passes was kept")
    return tuple(r for r in reasons if r is not None)
