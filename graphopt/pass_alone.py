"""A pass by itself, on parts of a model: the smallest to which it still does the same harm."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt.contract import Context, Effect, Pass
from graphopt.cutting import depend_on_inputs, key_of, part_of, reads, values_of
from graphopt.deviations import Tolerance, Values, record_values
from graphopt.errors import GraphoptError
from graphopt.gate import Gate, interface_of
from graphopt.observe import Observer
from graphopt.recording import Feed
from graphopt.registry import pass_names
from graphopt.reproducer import Reproducer, fewest, reproducer
from graphopt.runtime import Reference, Session
from graphopt.samples import read_samples
from graphopt.signature import signature
from graphopt.skeleton import infer_shapes
from graphopt.validation import Budget

logger = logging.getLogger("graphopt")

RADII = (0, 1, 2, 4)
"""How far around the wrong nodes a part of the model begins, on which the pass is tried alone."""

PART_MAXIMUM = 120
"""Nodes of a part that the pass is tried on, unless nothing tells where to look."""


OVER = "is over its tolerance"


def inferred(model: ir.Model) -> ir.Model:
    """The model, with types and shapes inferred in place."""
    infer_shapes(model)
    return model


def kind_of(gate: Gate, candidate: ir.Model | None, one: Pass) -> str | None:
    """What kind of harm a pass did; None for none."""
    if candidate is None:
        return "raises"
    if gate.why_malformed(candidate, one.converts_interface) is not None:
        return "is malformed"
    if gate.why_rejected(candidate, one) is None:
        return None
    assert gate.feed is not None
    try:
        for reference in {gate.written, Reference.AS_DEPLOYED}:
            session = Session(candidate, reference, provider=gate.provider)
            for outputs in gate.feed.run(session):
                del outputs
    except GraphoptError:
        return "does not run"
    return OVER


@dataclass
class PassAlone:
    """A pass on parts of a model, fed with the values that they have in it."""

    one: Pass
    kind: str | None
    before: ir.Model
    feeds: Mapping[str, np.ndarray]
    gate: Gate
    tolerance: Tolerance
    provider: str
    values: Values = field(default_factory=Values)

    def smallest(self, around: Collection[str]) -> Reproducer | None:
        """The smallest part on which the pass does the same harm; None where none does.

        Args:
            around: the nodes that are known to come out wrong, by what they make; empty where that
                is not known.
        """
        self._record()
        for radius in RADII if around else ():
            nodes = self._near(around, radius)
            if len(nodes) <= PART_MAXIMUM and self._does_harm(nodes):
                return self._reproducer(fewest(nodes, self._does_harm))
        every = [key_of(node) for node in self.before.graph if key_of(node)]
        if (not around or len(every) <= PART_MAXIMUM) and self._does_harm(every):
            return self._reproducer(fewest(every, self._does_harm))
        return None

    def _record(self) -> None:
        moving = depend_on_inputs(self.before.graph)
        names = [
            name
            for name, value in values_of(self.before.graph).items()
            if value in moving
            and value.producer() is not None
            and isinstance(value.type, ir.TensorType)
            and value.dtype != ir.DataType.STRING
        ]
        self.values.add(self.feeds)
        session_of = partial(self._session, self.gate.written)
        record_values(self.values, self.before, names, self.feeds, session_of)

    def _session(self, reference: Reference, model: ir.Model, shapes_first: bool) -> Session:
        return Session(model, reference, provider=self.provider, shapes_first=shapes_first)

    def _near(self, around: Collection[str], radius: int) -> list[str]:
        """The nodes, and those that are so many steps before or behind them."""
        near = {node for node in self.before.graph if key_of(node) in around}
        for _ in range(radius):
            makers = {v.producer() for node in near for v in reads(node)} - {None}
            readers = {u.node for node in near for o in node.outputs for u in o.uses()}
            near |= {n for n in (*makers, *readers) if n is not None}
        return [key_of(node) for node in self.before.graph if node in near and key_of(node)]

    def _does_harm(self, nodes: Collection[str]) -> bool:
        return self._broken(set(nodes)) is not None

    def _broken(
        self, nodes: Collection[str]
    ) -> tuple[ir.Model, ir.Model | None, dict[str, np.ndarray]] | None:
        """The part, what the pass makes of it, and its inputs; None where that is right."""
        part = part_of(self.before, nodes, self.values)
        if part is None:
            return None
        expected = signature(part)
        if not all(read.name in self.values for read in expected):
            return None
        inputs = {read.name: self.values[read.name] for read in expected}
        feed = Feed(read_samples([inputs], expected), expected)
        try:
            gate = self._gate(part, feed)
        except GraphoptError:
            # What the pass was given must itself run.
            return None
        candidate = inferred(part.clone())
        try:
            made = candidate if self._applies(candidate, part, feed) else None
            if made is None:
                return None
        except Exception as error:  # as in the pipeline: a pass may be anyone's code
            logger.debug("%s raised on a part", self.one, exc_info=True)
            return (part, None, inputs) if self._raises_so(error) else None
        return (part, made, inputs) if kind_of(gate, made, self.one) == self.kind else None

    def _raises_so(self, error: Exception) -> bool:
        return self.kind == "raises" and not isinstance(error, AssertionError)

    def _gate(self, part: ir.Model, feed: Feed) -> Gate:
        gate = Gate(
            interface_of(part),
            part.clone(),
            feed,
            checks=self.gate.checks,
            provider=self.provider,
            budgets=self._budgets(),
            lossless_samples=1,
        )
        gate.start_from(inferred(part.clone()))
        return gate

    def _budgets(self) -> tuple[Budget, ...]:
        """For a lossy pass, what a part may be off by: outputs of the whole are none of its own."""
        if self.one.effect is not Effect.LOSSY:
            return ()
        own = [b.limit for b in self.gate.budgets if b.metric == "rel-l2"]
        return (Budget(min(own, default=self.one.error_budget)),)

    def _applies(self, candidate: ir.Model, part: ir.Model, feed: Feed) -> bool:
        """Apply the pass; whether it did anything."""
        context = Context(
            read_original=lambda: part,
            samples=feed.samples,
            provider=self.provider,
            observer=Observer(feed, self.provider),
        )
        if self.one.refuse(candidate, context) is not None:
            return False
        did = bool(self.one.apply(candidate, context))
        graph = candidate.graph
        outputs = set(graph.outputs)
        for value in [v for v in graph.initializers.values() if not v.uses() and v not in outputs]:
            del graph.initializers[value.name or ""]
        return did

    def _reproducer(self, nodes: Sequence[str]) -> Reproducer | None:
        broken = self._broken(set(nodes))
        assert broken is not None
        part, made, inputs = broken
        passes = str(self.one) if self.one.name in pass_names() else None
        if made is not None and self.kind == OVER:
            found = reproducer(part, made, inputs, self.tolerance, self.provider)
            if found is not None:
                budget = next(map(str, self._budgets()), None)
                return replace(found, passes=passes, budget=budget)
            made = None
        session = Session(part, Reference.AS_DEPLOYED, provider=self.provider)
        expected = session.run({name: inputs[name] for name in session.inputs})
        return Reproducer(part, None, inputs, expected, "0", float("inf"), passes)
