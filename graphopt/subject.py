"""A model as it was given, with what is needed to run it: the subject of every verb."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from graphopt import loading, runtime, saving
from graphopt import samples as sampling
from graphopt.benchmark import BenchmarkReport
from graphopt.benchmark import benchmark as time_models
from graphopt.collection import no_collection
from graphopt.contract import Sample
from graphopt.errors import ModelError, SampleError
from graphopt.loading import ModelLike, Source
from graphopt.operators import all_graphs, graphs_and_functions, is_random
from graphopt.random_samples import random_samples
from graphopt.recording import Feed
from graphopt.runtime import Reference, Session
from graphopt.samples import Samples
from graphopt.signature import signature
from graphopt.state import check_state, guess_state

RANDOM_SAMPLES_DEFAULT = 4

SamplesLike = str | Path | Iterable[Sample]
State = Sequence[tuple[str, str]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model as it was given, ready to be run.

    Attributes:
        source: as loaded.
        given: what onnxruntime is to load: the file itself where there is one.
        provider: "cpu" or "cuda".
        notes: what the user should know of it; added to as it comes up.
    """

    source: Source
    given: ir.Model | Path
    provider: str
    notes: list[str]

    def feed(self, samples: SamplesLike | None, random_samples: int | None, state: State) -> Feed:
        """The samples that were asked for, checked against the model.

        Raises:
            SampleError: they do not fit, or there are none.
        """
        if samples is not None and random_samples is not None:
            raise SampleError("give samples or a number of random samples, not both")
        inputs = signature(self.source.model)
        state = tuple(state)
        check_state(self.source.model, state)
        if samples is not None:
            if not state:
                state, samples = self._guessed_state(samples)
            return Feed(sampling.read_samples(samples, inputs, state), inputs, tuple(state))
        count = random_samples if random_samples is not None else RANDOM_SAMPLES_DEFAULT
        if random_samples is None:
            self.notes.append(f"no samples were given: judged on {count} random ones")
        return Feed(self._draw(count), inputs, tuple(state))

    def _guessed_state(self, samples: SamplesLike) -> tuple[State, SamplesLike]:
        """State that the samples leave out, if its names tell where it comes from."""
        guess = guess_state(self.source.model)
        if not guess:
            return (), samples
        names, samples = sampling.first_names(samples)
        options = " ".join(f"--state {output}={name}" for output, name in guess)
        if all(name in names for _, name in guess):
            self.notes.append(f"the model looks stateful; to judge it by roll-outs, give {options}")
            return (), samples
        self.notes.append(
            f"the samples leave state out, so they are roll-outs in name order: {options}"
        )
        return guess, samples

    def split(self, feed: Feed, gate_samples: int | None, passes_look: bool) -> tuple[Feed, Feed]:
        """Samples for the passes, and samples for the gate.

        Args:
            feed: all samples.
            gate_samples: how many are for the gate alone; see `Samples.split`.
            passes_look: a pass is going to look at samples, so that it matters if both share them.
        """
        calibration, judged = feed.split(gate_samples)
        if judged is calibration and passes_look:
            count = len(judged.samples.sequences)
            what = "sequence" if feed.state else "sample"
            self.notes.append(
                f"{count} {what}{'s' if count > 1 else ''} for both passes and gate: too few to "
                "split"
            )
        return calibration, judged

    @no_collection()
    def working_copy(self, keep_overridable: bool, is_needed_again: bool) -> ir.Model:
        """The model for the passes to start from.

        Args:
            keep_overridable: leave inputs that have a default open to callers; otherwise they are
                constants in the copy.
            is_needed_again: the model as it was given is going to be looked at later, too.
        """
        source = self.source
        working = source.model.clone() if is_needed_again else source.give_away()
        loading.allow_new_initializers(working)
        frozen = () if keep_overridable else loading.freeze_overridable_inputs(working)
        note = (
            f"{len(frozen)} initializers that were also inputs are constants now "
            "(--keep-overridable leaves them open)"
        )
        if frozen and note not in self.notes:
            self.notes.append(note)
        return working

    def is_random(self) -> bool:
        """Two runs on the same inputs may differ, so that outputs say nothing."""
        model = self.source.model
        found = sorted(
            {n.op_type for graph in graphs_and_functions(model) for n in graph if is_random(n)}
        )
        if found:
            self.notes.append(
                f"the model is random ({', '.join(found)}): judged on structure alone, its outputs "
                "were not compared"
            )
        return bool(found)

    def tell_of_bodies(self) -> None:
        """Note what samples cannot show of a model with bodies."""
        count = sum(1 for _ in all_graphs(self.source.model)) - 1
        if count:
            self.notes.append(
                f"the model has {count} bodies of If, Loop or Scan; one that no sample executes is "
                "judged on structure alone"
            )

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
            drawn = random_samples(self.source.model, count, accepts)
        except SampleError as error:
            raise SampleError(f"{error}: {reason}" if reason else str(error)) from None
        read = sampling.read_samples(drawn, signature(self.source.model))
        return replace(read, random=True)

    def file(self, path: Path) -> Path:
        """The file of the model; one is written at `path` when it was given in memory."""
        if isinstance(self.given, Path):
            return self.given
        saving.save(self.given, path)
        return path

    def measure(self, result: ir.Model, samples: Samples, threads: int) -> BenchmarkReport:
        """Time the model against a result, both from files, as a user would load them."""
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            before = self.file(Path(folder) / "original.onnx")
            after = Path(folder) / "optimized.onnx"
            saving.save(result, after, external_data=self.source.external_data())
            models = [("original", before), ("optimized", after)]
            return time_models(models, samples=samples, provider=self.provider, threads=threads)


def open_subject(
    model: ModelLike, provider: str, runs: bool, drop_training_info: bool, progress: Progress
) -> Subject:
    """Load a model; where it is going to be run, let onnxruntime load it as given first.

    Raises:
        ModelError: it cannot be read, or onnxruntime does not load it.
        RuntimeUnavailable: onnxruntime or the provider is not there.
    """
    if runs:
        runtime.check_provider(provider)
    progress("loading")
    source = loading.open_model(model, drop_training_info=drop_training_info)
    given = source.path or (source.model.clone() if runs else source.model)
    subject = Subject(source, given, provider, list(source.notes))
    if not runs:
        if source.invalid is not None:
            raise ModelError(source.invalid)
        return subject
    try:
        Session(given, Reference.AS_DEPLOYED, provider=provider)
    except ModelError as error:
        reason = _why_not_loaded(str(error), source.model)
        raise ModelError(f"onnxruntime does not load the model as given: {reason}") from None
    if source.invalid is not None:
        subject.notes.append(
            f"the onnx checker rejects the model as given ({source.invalid}), but onnxruntime "
            "loads it: the checker is left out of the gate"
        )
    return subject


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
