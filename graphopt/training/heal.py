"""heal: let an optimized model learn again from the original what it lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch

from graphopt import saving
from graphopt.contract import Effect
from graphopt.errors import CheckFailed, ModelError, RuntimeUnavailable, SpecError
from graphopt.loading import ModelLike, Source
from graphopt.recording import Feed, compare, record
from graphopt.runtime import Reference, Session
from graphopt.signature import signature
from graphopt.subject import SamplesLike, State, Subject, open_subject
from graphopt.training.companions import beside
from graphopt.training.healing import LOOKS, Budget, Healing, Material, Point
from graphopt.training.interpreter import inlined
from graphopt.training.learnable_outputs import Learnable, learnable
from graphopt.training.sample_batches import Batches, from_all_over
from graphopt.training.stored_weights import stored_weights, write
from graphopt.training.weight_forms import StoredWeight, forms_of
from graphopt.validation import OutputError, why_over, worst

MINUTES_DEFAULT = 10.0

HEALED_KEY = "graphopt.healed_by"
"""Key in a model's `metadata_props`: the hash of the original that it learnt from."""


def _quiet(_: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Healed:
    """The result of healing, with its evidence.

    Attributes:
        model: the optimized graph with healed weights: same nodes, formats and bytes of weights.
        weights: how many of its weights learnt, by the form in which they are stored.
        elements: of all of them.
        features: values on the way to the outputs that both models compute.
        samples: how many were learnt from, and how many judged.
        way: how the models were run on several samples.
        curve: the error on the samples that judge, from the first moment to the last.
        steps: of the optimizer.
        before: errors of the optimized model's outputs, on the samples that judge, as deployed.
        after: those of the healed one.
        stored_bytes: of the model's file.
        notes: what else a user should know.
        source: the optimized model as it was given.
    """

    model: ir.Model
    weights: Mapping[str, int]
    elements: int
    features: int
    samples: tuple[int, int]
    way: str
    curve: tuple[Point, ...]
    steps: int
    before: tuple[OutputError, ...]
    after: tuple[OutputError, ...]
    stored_bytes: int
    notes: tuple[str, ...]
    source: Source

    def save(self, path: str | Path) -> Healed:
        """Write the model; returns the result with its size.

        Raises:
            ModelError: it cannot be written there.
        """
        written_bytes = saving.save(
            self.model,
            path,
            external_data=self.source.external_data(),
            verify=_load,
        )
        return replace(self, stored_bytes=written_bytes)


def _load(path: Path) -> None:
    Session(path, Reference.AS_DEPLOYED)


def heal(
    original: ModelLike,
    optimized: ModelLike,
    *,
    samples: SamplesLike,
    state: State = (),
    minutes: float = MINUTES_DEFAULT,
    steps: int | None = None,
    gate_samples: int | None = None,
    device: str = "cpu",
    processes: int = 1,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = _quiet,
) -> Healed:
    """Let an optimized model learn from the original again, without labels.

    What decides which numbers a weight may hold stays: zeros that were pruned, scales and zero
    points of grids, codebooks. Which of these numbers each one is, learns, and so do the weights
    and biases that are stored as they are. Nodes, formats and bytes stay.

    Args:
        original: path, bytes, `onnx.ModelProto` or `ir.Model`; never modified.
        optimized: what passes made of it; never modified.
        samples: see `graphopt.optimize`; 20 % of them judge, and are never learnt from.
        state: pairs of output and input that carry state from sample to sample.
        minutes: how long to learn.
        steps: learn for so many steps instead, so that two runs on a machine give the same.
        gate_samples: how many samples judge.
        device: "cpu" or "cuda".
        processes: how many learn side by side, each from its share of every batch; on CUDA each
            has a device of its own.
        threads: of torch; None leaves them as they are.
        seed: of the order of the samples and of how they are seen.
        progress: called with a few words on what goes on.

    Raises:
        GraphoptError: a model or a sample is at fault, or an operator is not known.
        CheckFailed: the outputs on the samples that judge did not come nearer.
    """
    _check(minutes, steps, device, processes)
    reference = open_subject(original, "cpu", True, False, progress)
    subject = open_subject(optimized, "cpu", True, False, progress)
    _check_interfaces(reference, subject)
    if reference.is_random():
        raise ModelError("the original is random: there are no outputs to learn")
    feed = reference.feed(samples, None, state)
    learnt, judged = feed.split(gate_samples)
    working = inlined(subject.working_copy(keep_overridable=True, is_needed_again=True))
    with _threads(threads), _told():
        compared = _compared(reference.source.model, working, learnt)
        progress("comparing with the original")
        judge = _Judge(reference, compared, judged)
        given, before = working.clone(), judge.errors(working)
        _check_lost(before)
        material = Material(
            compared.original, learnt.samples, judged.samples, feed.inputs, feed.state, seed
        )
        budget, place = Budget(minutes, steps), torch.device(device)
        with beside(processes, compared.optimized, material, budget, device) as ranks:
            healing = Healing(compared.optimized, material, place, ranks, progress=progress)
            numbers = healing.run(budget)
    write(working.graph, list(zip(healing.weights, numbers, strict=True)))
    _check_kept(given, working, healing.weights)
    progress("comparing with the original")
    after = judge.errors(working)
    _check_better(before, after, compared.names)
    working.metadata_props[HEALED_KEY] = reference.source.sha256()
    told = (*reference.notes, *subject.notes, *_notes(compared, learnt, judged))
    notes = tuple(dict.fromkeys(told))
    return _healed(working, healing, before, after, subject.source, notes)


def _healed(
    model: ir.Model,
    healing: Healing,
    before: tuple[OutputError, ...],
    after: tuple[OutputError, ...],
    source: Source,
    notes: tuple[str, ...],
) -> Healed:
    material = healing.material
    return Healed(
        model=model,
        weights=Counter(forms_of(healing.weights)),
        elements=sum(weight.numbers.numel() for weight in healing.weights),
        features=len(healing.features),
        samples=(len(material.training), len(material.held_out)),
        way=healing.student.way.value,
        curve=tuple(healing.curve),
        steps=healing.curve[-1].steps,
        before=before,
        after=after,
        stored_bytes=saving.stored_bytes(model, source.external_data()),
        notes=notes,
        source=source,
    )


def _compared(original: ir.Model, optimized: ir.Model, learnt: Feed) -> Learnable:
    """What can be compared of both models, by a few samples."""
    chosen = from_all_over(learnt.samples, LOOKS).first(LOOKS)
    batches = Batches(chosen, 1, learnt.inputs, torch.device("cpu"))
    looks = [step[0] for batch in batches.once() for step in batch]
    return learnable(original, optimized, looks, [output for output, _ in learnt.state])


def _notes(compared: Learnable, learnt: Feed, judged: Feed) -> Iterator[str]:
    """What a user should know of the way in which it was learnt."""
    if compared.replaced:
        yield (
            f"{', '.join(compared.replaced)}: no gradients come from there; what counts is what "
            "else is compared"
        )
    if learnt is judged:
        count = len(judged.samples.sequences)
        what = "sequence" if judged.state else "sample"
        yield (
            f"{count} {what}{'s' if count > 1 else ''}, too few to split: what judges was learnt "
            "from, too"
        )


@contextmanager
def _told() -> Iterator[None]:
    """What torch cannot compute is told, with the node."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        places = getattr(error, "__notes__", [])
        if not places:
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"torch cannot compute the model, {places[0]}: {first}") from error


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(minutes: float, steps: int | None, device: str, processes: int) -> None:
    if not minutes > 0:
        raise SpecError(f"{minutes} minutes to heal; give more than 0")
    if steps is not None and steps < 1:
        raise SpecError(f"{steps} steps to heal; give 1 or more")
    if device not in ("cpu", "cuda"):
        raise SpecError(f"there is no device {device!r}; there is cpu, cuda")
    if processes < 1:
        raise SpecError(f"{processes} processes to heal; give 1 or more")
    if device == "cuda" and torch.cuda.device_count() < processes:
        found = torch.cuda.device_count()
        raise RuntimeUnavailable(f"torch finds {found} CUDA devices for {processes} processes")


def _check_interfaces(reference: Subject, subject: Subject) -> None:
    """Raise ModelError where the second model is not made of the first."""
    first, second = reference.source.model.graph, subject.source.model.graph
    taken = {i.name for i in signature(reference.source.model)}
    other = [i.name for i in signature(subject.source.model) if i.required and i.name not in taken]
    if other:
        raise ModelError(
            f"the optimized model has an input {other[0]!r} that the original has not: it was "
            "made of another model"
        )
    names = {value.name for value in second.outputs}
    missing = [value.name for value in first.outputs if value.name not in names]
    if missing:
        raise ModelError(
            f"the optimized model has no output {missing[0]!r}, which the original has: it was "
            "made of another model"
        )


def _check_kept(before: ir.Model, after: ir.Model, weights: list[StoredWeight]) -> None:
    """The law of healing, looked at in what is going to be written."""
    found = {w.value.name: w for w in stored_weights(after.graph)}
    learnt = {constant.name for w in weights for constant in w.constants(w.numbers)}
    for weight in weights:
        again = found.get(weight.value.name)
        if again is None or not torch.equal(weight.nearest(again.numbers), again.numbers):
            raise AssertionError(f"{weight.value.name} holds numbers that its form has not")
    for name, value in before.graph.initializers.items():
        stored = after.graph.initializers[name].const_value
        if stored is value.const_value or stored is None or value.const_value is None:
            continue
        if stored.nbytes != value.const_value.nbytes or name not in learnt:
            raise AssertionError(f"the constant {name} changed in more than its numbers")


class _Judge:
    """Compares outputs on the samples that judge, as onnxruntime gives them when deployed."""

    def __init__(self, reference: Subject, compared: Learnable, judged: Feed) -> None:
        self._compared, self._judged = compared, judged
        model = compared.of_original(reference.source.model) if compared.ends else reference.given
        self._recorded = record(judged.run(Session(model, Reference.AS_DEPLOYED)))

    def errors(self, optimized: ir.Model) -> tuple[OutputError, ...]:
        """Of an optimized model."""
        session = Session(self._compared.of_optimized(optimized), Reference.AS_DEPLOYED)
        return compare(self._judged.run(session), [self._recorded])[0]


def _check_lost(before: tuple[OutputError, ...]) -> None:
    if why_over(Effect.ROUNDING, before) is None:
        raise CheckFailed(
            "there is nothing to heal: the outputs of both models agree already, but for rounding, "
            "on the samples that judge"
        )


def _check_better(
    before: tuple[OutputError, ...], after: tuple[OutputError, ...], names: Collection[str]
) -> None:
    """Raise CheckFailed where the worst of the outputs that were learnt is no better."""
    first, second = ([o for o in outputs if o.name in names] for outputs in (before, after))
    wrong = next((o for o in second if o.mismatch is not None), None)
    if wrong is not None:
        raise CheckFailed(f"healing did not help: output {wrong.name!r} {wrong.mismatch}")
    if worst(second) >= worst(first):
        raise CheckFailed(
            "healing did not help: the worst relative L2 error of the outputs was "
            f"{worst(first):.3g} and is {worst(second):.3g} on samples that it did not learn from. "
            "Give more samples, or let it learn for longer"
        )
