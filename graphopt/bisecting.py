"""Which pass, and which node, makes a model wrong.

Passes run one by one, and each is judged as in a run of `optimize`, but on all samples. What the
gate would roll back is judged once more against the model before it alone: if it is over there too,
the pass is to blame; if not, the error has added up, and the run goes on from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt.bisection import Bisection, Trial, TrialVerdict
from graphopt.contract import Context, Effect, Pass
from graphopt.cutting import key_of
from graphopt.deviations import Tolerance
from graphopt.errors import ModelError
from graphopt.finding import Finding
from graphopt.gate import Gate, coarsest, computed_in_half, interface_of
from graphopt.ledger import Step, size_as_given
from graphopt.observe import Observer
from graphopt.operators import graphs_and_functions, is_random
from graphopt.pass_alone import OVER, PassAlone, inferred, kind_of
from graphopt.pipeline import Pipeline
from graphopt.recipes import Plan
from graphopt.recording import Feed
from graphopt.runtime import Reference, Session
from graphopt.scratch import Scratch
from graphopt.subject import Progress, Subject
from graphopt.validation import Budget


def check_not_random(subject: Subject) -> None:
    """Raise ModelError for a model whose outputs differ from run to run."""
    found = sorted(
        {n.op_type for g in graphs_and_functions(subject.source.model) for n in g if is_random(n)}
    )
    if found:
        raise ModelError(
            f"{subject.source.path or 'the model'} is random ({', '.join(found)}): its outputs "
            "differ from run to run, so that no error can be told from chance; replace the random "
            "operators by constants or inputs"
        )


# ------------------------------------------------------------------ two models


def bisect_models(
    first: Subject, second: Subject, feed: Feed, budgets: tuple[Budget, ...], progress: Progress
) -> Bisection:
    """Find the first node of a model that makes its outputs other than those of the original.

    Args:
        first: the original.
        second: what became of it.
        feed: samples of the original.
        budgets: what the outputs may be off by; empty demands equality but for rounding.
        progress: called with a few words on what goes on.
    """
    before, after = (inferred(s.working_copy(False, True)) for s in (first, second))
    effect = Effect.LOSSY if budgets else Effect.ROUNDING
    halves = coarsest(computed_in_half(before), computed_in_half(after))
    found = Finding(before, after, feed, first.provider, progress)
    reference = Reference.AS_DEPLOYED if budgets else Reference.AS_WRITTEN
    tolerance = Tolerance(effect, budgets, reference, halves)
    return replace(found.judge(tolerance), notes=(*first.notes, *second.notes, *found.all_notes))


# ------------------------------------------------------------------ passes, one by one


class _Guilty(Exception):
    """A pass is to blame; ends the run."""

    def __init__(self, one: Pass, candidate: ir.Model | None, reason: str, gate: Gate) -> None:
        super().__init__(reason)
        self.one, self.candidate, self.reason, self.gate = one, candidate, reason, gate


@dataclass
class _Witness:
    """Judges again, by itself, each pass that the gate rejects."""

    gate_for: Callable[[ir.Model], Gate]
    pipeline: Pipeline | None = None
    added_up: tuple[Pass, str, ir.Model, Gate] | None = None

    def __call__(self, one: Pass, candidate: ir.Model | None, reason: str | None) -> bool:
        if reason is None:
            return True
        assert self.pipeline is not None
        alone = self.gate_for(self.pipeline.model)
        if candidate is None:
            raise _Guilty(one, None, reason, alone)
        why = alone.why_rejected(candidate, one)
        if why is not None:
            raise _Guilty(one, candidate, why, alone)
        if self.added_up is None:
            self.added_up = one, reason, candidate.clone(), alone
        self.pipeline.gate = self.gate_for(candidate)
        return True


def bisect_passes(
    subject: Subject,
    plan: Plan,
    feed: Feed,
    calibration: Feed,
    budgets: tuple[Budget, ...],
    progress: Progress,
) -> Bisection:
    """Find the first pass that makes a model wrong, and where in the model it does.

    Args:
        subject: the model.
        plan: the passes.
        feed: all samples; they judge.
        calibration: the samples that passes may look at.
        budgets: of lossy passes; empty leaves each its own.
        progress: called with a few words on what goes on.
    """
    working = subject.working_copy(False, True)

    def gate_for(model: ir.Model | Path, of: ir.Model) -> Gate:
        gate = Gate(
            interface=interface_of(of),
            given=model,
            feed=feed,
            checks=subject.source.invalid is None,
            provider=subject.provider,
            budgets=budgets,
            lossless_samples=len(feed.samples),
        )
        gate.start_from(inferred(of.clone()))
        return gate

    witness = _Witness(lambda model: gate_for(model.clone(), model))
    external_data = subject.source.external_data()
    context = Context(
        read_original=lambda: subject.source.model,
        samples=calibration.samples,
        provider=subject.provider,
        progress=progress,
        scratch=Scratch() if external_data else None,
        observer=Observer(calibration, subject.provider),
    )
    pipeline = Pipeline(
        working,
        size_as_given(subject.source),
        external_data,
        gate_for(subject.given, working),
        context,
        working.clone,
        witness=witness,
    )
    witness.pipeline = pipeline
    try:
        pipeline.run(plan)
    except _Guilty as guilt:
        return _of_guilty(guilt, subject, pipeline, feed, progress)
    if witness.added_up is not None:
        return _of_sum(witness.added_up, subject, pipeline, feed, progress)
    return Bisection(
        reason=None,
        guilty=None,
        trials=_trials(pipeline.steps, None),
        tolerance=_PASS_TOLERANCE,
        numerics=pipeline.gate.numerics(pipeline.model),
        origin=None,
        deviations=(),
        reproducer=None,
        notes=(*subject.notes, *pipeline.gate.notes),
    )


_PASS_TOLERANCE = "each pass by its effect"


def _trials(steps: Sequence[Step], added_up: tuple[str, str] | None) -> tuple[Trial, ...]:
    verdicts: dict[str, TrialVerdict] = {
        "kept": "within",
        "unchanged": "unchanged",
        "refused": "refused",
    }
    trials = []
    for step in steps:
        verdict, reason = verdicts[step.verdict], step.reason
        if added_up is not None and step.kept and step.spec == added_up[0]:
            verdict, reason, added_up = "adds up", added_up[1], None
        trials.append(
            Trial(step.spec, step.effect, verdict, reason, dict(step.changes), step.round)
        )
    return tuple(trials)


def _tolerance(one: Pass, candidate: ir.Model, gate: Gate, before: ir.Model) -> Tolerance:
    """What the gate judges a pass by."""
    if one.effect is Effect.LOSSY:
        return Tolerance(Effect.LOSSY, gate.budgets_for(one), Reference.AS_DEPLOYED)
    halves = coarsest(computed_in_half(before), computed_in_half(candidate))
    return Tolerance(gate.claim(candidate, one), (), gate.written, halves)


def _of_sum(
    added_up: tuple[Pass, str, ir.Model, Gate],
    subject: Subject,
    pipeline: Pipeline,
    feed: Feed,
    progress: Progress,
) -> Bisection:
    one, reason, candidate, gate = added_up
    before = inferred(subject.working_copy(False, True))
    tolerance = _tolerance(one, candidate, gate, before)
    if one.effect is Effect.EXACT:
        tolerance = replace(tolerance, effect=Effect.ROUNDING)
    finding = Finding(before, inferred(candidate), feed, subject.provider, progress)
    found = finding.judge(tolerance)
    return replace(
        found,
        reason=f"no pass is over its tolerance by itself, but from {one} on their sum is: {reason}",
        trials=_trials(pipeline.steps, (str(one), reason)),
        notes=(*subject.notes, *finding.all_notes),
    )


def _of_guilty(
    guilt: _Guilty, subject: Subject, pipeline: Pipeline, feed: Feed, progress: Progress
) -> Bisection:
    one, gate = guilt.one, guilt.gate
    before = inferred(pipeline.model.clone())
    trial = Trial(str(one), one.effect, "over", guilt.reason)
    found = Bisection(
        reason=guilt.reason,
        guilty=str(one),
        trials=(*_trials(pipeline.steps, None), trial),
        tolerance=_PASS_TOLERANCE,
        numerics={},
        origin=None,
        deviations=(),
        reproducer=None,
        notes=(),
    )
    kind, finding = kind_of(gate, guilt.candidate, one), None
    tolerance = Tolerance(one.effect)
    feeds: Mapping[str, np.ndarray] = {}
    around: Collection[str] = ()
    notes: list[str] = []
    if kind == OVER and guilt.candidate is not None:
        after = inferred(guilt.candidate.clone())
        tolerance = _tolerance(one, after, gate, before)
        finding = Finding(before, after, feed, subject.provider, progress)
        seen = finding.judge(tolerance)
        found = replace(
            seen,
            reason=guilt.reason,
            guilty=str(one),
            trials=found.trials,
            tolerance=seen.tolerance,
        )
        feeds, notes = finding.steps[0], finding.notes
        around = _nodes_before(before, finding)
    else:
        session = Session(before, gate.written, provider=subject.provider)
        feeds = next(iter(feed.steps(session)))[0]
    progress(f"looking for the smallest model that {one.name} breaks")
    alone = PassAlone(one, kind, before, feeds, gate, tolerance, subject.provider)
    small = alone.smallest(around)
    if small is not None and (small.is_small or found.reproducer is None):
        found = replace(found, reproducer=small)
    elif finding is not None:
        notes = [*finding.all_notes]
    else:
        notes.append("no reproducer: the pass does no harm to any part of the model that was tried")
    return replace(found, notes=(*subject.notes, *gate.notes, *notes))


def _nodes_before(before: ir.Model, finding: Finding) -> set[str]:
    """The nodes of the model before the pass that lead to the wrong value, by what they make."""
    if finding.cut is None:
        return set()
    kept = {value.name for node in finding.cut.before.graph for value in node.outputs}
    culprit = finding.divergence.culprit if finding.divergence is not None else None
    wrong = {culprit.pair.before} if culprit is not None else set()
    return {
        key_of(n) for n in before.graph if {o.name for o in n.outputs} & (kept | wrong) - {None}
    }
