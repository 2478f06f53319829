"""From two models, of which one is wrong, to the place where it begins, and a reproducer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphopt.bisection import Bisection, Origin
from graphopt.causes import causes
from graphopt.contract import Effect, describe
from graphopt.cutting import values_of
from graphopt.divergence import Deviation, Divergence, Tolerance, largest_errors, locate
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

    def judge(self, asked: Tolerance) -> Bisection:
        """Whether outputs are over the tolerance, and where it comes from.

        What is wrong as written is looked at as written: there, every node is run as the file says.
        """
        overs = {}
        for reference in (Reference.AS_WRITTEN, asked.reference):
            tolerance = replace(asked, reference=reference)
            if reference.value in self.numerics or not self._runs(reference):
                continue
            self.progress(f"comparing outputs {reference.value}")
            errors, steps = largest_errors(self.feed, *self._sessions(reference))
            self.numerics[reference.value] = errors
            overs[reference] = tolerance, tolerance.why_over(errors), steps
        if not overs:
            # Raises what keeps them from running.
            largest_errors(self.feed, *self._sessions(asked.reference))
        tolerance, reason, self.steps = self._chosen(overs, asked)
        empty = Bisection(
            reason=reason,
            guilty=None,
            trials=(),
            tolerance=_describe_tolerance(replace(asked)),
            numerics=self.numerics,
            origin=None,
            deviations=(),
            reproducer=None,
            notes=(),
        )
        return empty if reason is None else self._located(empty, tolerance)

    def _chosen(
        self,
        overs: Mapping[Reference, tuple[Tolerance, str | None, list[Mapping[str, np.ndarray]]]],
        asked: Tolerance,
    ) -> tuple[Tolerance, str | None, list[Mapping[str, np.ndarray]]]:
        """Under which reference to look: as written if it is wrong there and as it is judged."""
        judged = overs[asked.reference] if asked.reference in overs else next(iter(overs.values()))
        written = overs.get(Reference.AS_WRITTEN)
        if judged[1] is None or written is None or written[1] is None:
            return judged
        return written[0], judged[1], written[2]

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
            self.notes.append(
                "no value that both models have is off by itself"
                + ("; the error comes through the carried state" if self.feed.state else "")
            )
            return replace(so_far, deviations=found.deviations)
        self.progress("cutting out a reproducer")
        target = found.culprit.pair
        cut = shrunk_cut(self.before, self.after, found, target, tolerance, self.provider)
        self.cut = cut
        origin = self._origin(found, found.culprit, cut)
        made = None
        if cut is not None:
            made = reproducer(cut.before, cut.after, cut.inputs, tolerance, self.provider)
        self._tell(cut, made)
        return replace(so_far, origin=origin, deviations=found.deviations, reproducer=made)

    def _tell(self, cut: Cut | None, made: Reproducer | None) -> None:
        if cut is None:
            self.notes.append("no reproducer: what leads to the wrong value could not be cut out")
        elif made is None:
            self.notes.append("no reproducer: cut out and as deployed, the nodes are not wrong")
        elif not made.is_small:
            self.notes.append(
                f"the reproducer has {made.nodes} nodes: between the last values that are right "
                "and the first that is wrong there is nothing that both models have"
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
