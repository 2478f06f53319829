"""From two models, of which one is wrong, to the place where it begins, and a reproducer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.bisection import Bisection, Origin
from graphopt.causes import causes
from graphopt.contract import Effect, describe
from graphopt.cutting import values_of
from graphopt.deviations import Deviation, Divergence, Tolerance, largest_errors, locate
from graphopt.errors import GraphoptError
from graphopt.origins import operator_of
from graphopt.recording import Feed
from graphopt.reproducer import Cut, Reproducer, reproducer, shrunk_cut
from graphopt.runtime import Reference, Session
from graphopt.subject import Progress
from graphopt.validation import OutputError


def _describe_tolerance(tolerance: Tolerance) -> str:
    if tolerance.effect is Effect.LOSSY:
        return f"budget {' '.join(map(str, tolerance.budgets))}, {tolerance.reference.value}"
    words = {Effect.EXACT: "every bit the same", Effect.ROUNDING: "equal but for rounding"}
    return f"{words[tolerance.effect]}, {tolerance.reference.value}"


@dataclass(frozen=True)
class _Judged:
    """Outputs under one reference: why they are over the tolerance, and where most."""

    tolerance: Tolerance
    reason: str | None
    steps: list[Mapping[str, np.ndarray]]


class Finding:
    """From two models of which one is wrong to the place where it begins, and a reproducer."""

    def __init__(
        self, before: ir.Model, after: ir.Model, feed: Feed, provider: str, progress: Progress
    ) -> None:
        self.before, self.after, self.feed = before, after, feed
        self.provider, self.progress = provider, progress
        self.notes: list[str] = []
        self.numerics: dict[str, tuple[OutputError, ...]] = {}
        self.steps: list[Mapping[str, np.ndarray]] = []
        self.divergence: Divergence | None = None
        self.cut: Cut | None = None
        self.why_not_small: str | None = None

    @property
    def all_notes(self) -> tuple[str, ...]:
        """What a user should know, also of the reproducer."""
        more = () if self.why_not_small is None else (self.why_not_small,)
        return (*self.notes, *more)

    def judge(self, asked: Tolerance) -> Bisection:
        """Whether outputs are over the tolerance, and where it comes from.

        What is wrong as written is looked at as written: there, every node is run as the file says.
        """
        found: dict[Reference, _Judged] = {}
        for reference in Reference:
            tolerance = replace(asked, reference=reference)
            if not self._runs(reference):
                continue
            self.progress(f"comparing outputs {reference.value}")
            errors, steps = largest_errors(self.feed, *self._sessions(reference))
            self.numerics[reference.value] = errors
            found[reference] = _Judged(tolerance, tolerance.why_over(errors), steps)
        if not found:
            # Raises what keeps them from running.
            largest_errors(self.feed, *self._sessions(asked.reference))
        judged = found.get(asked.reference) or next(iter(found.values()))
        written = found.get(Reference.AS_WRITTEN, judged)
        looked_at = judged if written.reason is None else written
        self.steps = looked_at.steps
        empty = Bisection(
            reason=judged.reason,
            guilty=None,
            trials=(),
            tolerance=_describe_tolerance(judged.tolerance),
            numerics=self.numerics,
            origin=None,
            deviations=(),
            reproducer=None,
            notes=(),
        )
        return empty if judged.reason is None else self._located(empty, looked_at.tolerance)

    def _session(self, model: ir.Model, reference: Reference) -> Session:
        return Session(model, reference, provider=self.provider)

    def _sessions(self, reference: Reference) -> tuple[Session, Session]:
        return self._session(self.before, reference), self._session(self.after, reference)

    def _runs(self, reference: Reference) -> bool:
        """Both models run under the reference; onnxruntime 1.32 does not run all as written."""
        try:
            for model in (self.before, self.after):
                for outputs in self.feed.run(self._session(model, reference)):
                    del outputs
                    break
        except GraphoptError as error:
            self.notes.append(f"not run {reference.value}: {error}")
            return False
        return True

    def _located(self, so_far: Bisection, tolerance: Tolerance) -> Bisection:
        self.progress("comparing values inside")
        found = locate(self.before, self.after, self.steps, tolerance, self.provider)
        self.divergence = found
        if found.culprit is None:
            self.notes.append(self._why_nowhere(tolerance))
            return replace(so_far, deviations=found.deviations)
        self.progress("cutting out a reproducer")
        target = found.culprit.pair
        cut = shrunk_cut(self.before, self.after, found, target, tolerance, self.provider)
        self.cut = cut
        origin = self._origin(found, found.culprit, cut)
        made = None
        if cut is not None:
            made = reproducer(cut.before, cut.after, cut.inputs, tolerance, self.provider)
        self.why_not_small = self._why_not_small(cut, made)
        return replace(so_far, origin=origin, deviations=found.deviations, reproducer=made)

    def _why_nowhere(self, tolerance: Tolerance) -> str:
        what = "no value that both models have is off by itself"
        if tolerance.reference is Reference.AS_DEPLOYED:
            return (
                f"{what}: the error shows as deployed only, where onnxruntime fuses nodes, and it "
                "fuses others where values inside are looked at"
            )
        return f"{what}: the error comes through the carried state" if self.feed.state else what

    def _why_not_small(self, cut: Cut | None, made: Reproducer | None) -> str | None:
        if cut is None:
            return "no reproducer: what leads to the wrong value could not be cut out"
        if made is None:
            return "no reproducer: cut out and as deployed, the nodes are not wrong"
        if made.is_small:
            return None
        return (
            f"the reproducer has {made.nodes} nodes: between the last values that are right and "
            "the first that is wrong there is nothing that both models have"
        )

    def _origin(self, found: Divergence, culprit: Deviation, cut: Cut | None) -> Origin:
        pair = culprit.pair
        ends = values_of(self.before.graph)[pair.before], values_of(self.after.graph)[pair.after]
        nodes = cut.nodes if cut is not None else ()
        known = {p.after: found.values[p.before] for p in found.pairs if p.before in found.values}
        right = found.values[pair.before]
        wrong = right
        if cut is not None:
            session = self._session(cut.after, Reference.AS_WRITTEN)
            (wrong,) = session.run({n: cut.inputs[n] for n in session.inputs}).values()
        node = ends[1].producer()
        return Origin(
            node=describe(node) if node is not None else pair.after,
            operator=operator_of(node) if node is not None else "",
            value=pair.after,
            value_before=pair.before,
            reads=tuple(p.before for p in cut.sources) if cut is not None else (),
            nodes=tuple(f"{operator_of(n)} {describe(n)!r}" for n in nodes),
            begins=found.begins,
            total=culprit.total,
            own=culprit.own,
            causes=causes(self.before, self.after, ends, nodes, known, (right, wrong)),
        )
