"""Runs passes, gates each, rolls back what breaks, and keeps the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import onnx_ir as ir

from graphopt.collection import no_collection
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.errors import CheckFailed, GraphoptError
from graphopt.gate import Gate
from graphopt.ledger import Size, Step, Verdict, size_of
from graphopt.operators import (
    ONNX_DOMAINS,
    NodeIndex,
    attributes_of,
    graphs_and_functions,
)
from graphopt.recipes import Plan
from graphopt.skeleton import infer_shapes, known_shape

MESSAGE_MAXIMUM = 300
"""Characters of the message of a pass that raised an error."""

RAISED = "it raised"
"""So begins the reason of a step whose pass is at fault, or what it ran on."""

logger = logging.getLogger("graphopt")

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)

Outcome = tuple[Change, Verdict, str | None]
"""What a pass did, whether that stays, and why not."""

Attempt = Callable[[Pass], Outcome]

ROUNDS_MAXIMUM = 20
"""A plan that repeats ends after so many rounds even where passes keep undoing one another."""


@dataclass
class Pipeline:
    """Passes at work on one model.

    A gate that runs models judges after every pass, and what it rejects is rolled back to a
    snapshot. Without that, all passes run first and the gate looks at the result once; only when
    something is wrong do they run again, one by one, to find out which pass it was. So the work
    on a graph of many nodes takes no snapshots.

    Attributes:
        model: as far as it has come; replaced by a rewritten clone when the gate lets that.
        size: of the model.
        external_data: with which the model is going to be saved; see `graphopt.saving.save`.
        gate: judges every rewritten clone.
        context: for the passes.
        fresh: makes the model as it was before any pass.
        strict: raise where a pass is rejected.
        clock: latency of the second model over that of the first; None measures nothing.
        witness: told of each candidate, None where the pass raised, and why it was rejected, if it
            was; whether the run goes on from it. None leaves that to the gate.
        narrows: what is rejected is tried in milder forms.
        steps: the ledger.
    """

    model: ir.Model
    size: Size
    external_data: bool | None
    gate: Gate
    context: Context
    fresh: Callable[[], ir.Model]
    strict: bool = False
    clock: Callable[[ir.Model, ir.Model], float] | None = None
    witness: Callable[[Pass, ir.Model | None, str | None], bool] | None = None
    narrows: bool = True
    steps: list[Step] = field(default_factory=list)
    _unread: set[str] = field(default_factory=set)
    _index: NodeIndex = field(init=False)
    _spare: ir.Model | None = None
    _latency_ratio: float | None = None
    _model_traits: list[object] = field(default_factory=list)

    def run(self, plan: Plan) -> None:
        """Run all passes, in order, once or until none of them finds anything.

        A pass that was rejected is not asked again in later rounds, nor is one that refused or
        found nothing in the model as it is.

        Raises:
            CheckFailed: `strict`, and the gate rejected a pass.
        """
        given = self.size
        if not self.gate.loads and self._run_at_once(plan):
            return
        if not self.gate.loads:
            self.model, self.size, self.steps = self.fresh(), given, []
        infer_shapes(self.model)
        self.gate.start_from(self.model)
        self._run_rounds(plan, self._try)

    @no_collection()
    def _run_at_once(self, plan: Plan) -> bool:
        """Whether all passes ran to the end and the gate accepts the result."""
        infer_shapes(self.model)
        try:
            self._run_rounds(plan, self._apply)
        except Exception:  # a pass may be anyone's code; one by one it will be named
            logger.debug("a pass raised", exc_info=True)
            return False
        converted = any(one.converts_interface for one in plan.passes)
        return self.gate.why_malformed(self.model, converted) is None

    def _run_rounds(self, plan: Plan, attempt: Attempt) -> None:
        """Run the lossless passes before the first lossy one to their end, then all others."""
        self._index = NodeIndex(self.model)
        self._unread = _unread_initializers(self._index.graphs)
        for stage in _stages(plan):
            self._run_stage(stage, plan.repeat, attempt)

    def _run_stage(self, passes: Sequence[Pass], repeat: bool, attempt: Attempt) -> None:
        waiting = [(one, -1) for one in passes]
        version = 0
        for round_number in range(1, ROUNDS_MAXIMUM + 1):
            if round_number > 1 and _lacks_sizes(self._index.graphs):
                # Who found nothing may find something where more is known.
                version += infer_shapes(self.model)
                self._spare = None
            left = []
            for one, found_nothing_in in waiting:
                if found_nothing_in == version:
                    left.append((one, version))
                    continue
                step = self._step(one, round_number, attempt)
                if round_number == 1 or step.verdict not in ("unchanged", "refused"):
                    self.steps.append(step)
                version += step.kept
                if step.verdict not in ("rolled back", "too slow"):
                    left.append((one, -1 if step.kept else version))
            waiting = left
            if not repeat or _are_lossy(passes) or all(seen == version for _, seen in waiting):
                return

    def _step(self, one: Pass, round_number: int, attempt: Attempt) -> Step:
        started = time.perf_counter()
        self.context.progress(one.name)
        before, self._latency_ratio = self.size, None
        change, verdict, reason = attempt(one)
        tried = list[str]()
        while verdict == "rolled back" and (narrower := self._narrower(one)) is not None:
            narrowed = attempt(narrower)
            if narrowed[1] == "unchanged":
                # So narrow that nothing is left to do: what is to be told is why more was not done.
                break
            tried.append(f"{one} was rolled back: {reason}")
            one, (change, verdict, reason) = narrower, narrowed
        if verdict == "rolled back":
            logger.warning("%s was rolled back: %s", one, reason)
        if verdict == "rolled back" and self.strict:
            raise CheckFailed(f"{one} was rejected (--strict): {reason}")
        return Step(
            spec=str(one),
            effect=one.effect,
            verdict=verdict,
            reason=reason,
            changes=dict(change.counts),
            skips=tuple(change.skips),
            nodes_before=before.nodes,
            nodes_after=self.size.nodes,
            bytes_before=before.stored_bytes,
            bytes_after=self.size.stored_bytes,
            seconds=time.perf_counter() - started,
            round=round_number,
            max_error=self.gate.budget_text(one) if one.effect is Effect.LOSSY else None,
            latency_ratio=self._latency_ratio,
            notes=(*tried, *change.notes),
        )

    def _narrower(self, one: Pass) -> Pass | None:
        return one.narrow() if self.narrows else None

    def _apply(self, one: Pass) -> Outcome:
        """Apply the pass to the model itself."""
        refusal = one.refuse(self.model, self.context)
        if refusal is not None:
            return Change(), "refused", refusal
        if self._has_nothing_for(one):
            return Change(), "unchanged", None
        change = one.apply(self.model, replace(self.context, index=self._index))
        if not change:
            return change, "unchanged", None
        self._take(self._tidied(self.model))
        return change, "kept", None

    def _tidied(self, model: ir.Model) -> NodeIndex:
        """Remove what a pass left unread; the nodes of the model as they are now."""
        index = NodeIndex(model)
        _drop_orphans(self._unread, index.graphs)
        return index

    def _take(self, index: NodeIndex) -> None:
        """Go on from a model that a pass has changed."""
        if _lacks_types(index.graphs):
            infer_shapes(index.model)
        self.model, self._index = index.model, index
        self.size = size_of(index.model, self.external_data, index.counts)

    def _why_too_slow(self, candidate: ir.Model, one: Pass) -> str | None:
        """Why the candidate does not pay, by the clock; None where it does or nobody measures."""
        if self.clock is None or one.max_latency is None:
            return None
        self.context.progress(f"timing {one.name}")
        ratio = self._latency_ratio = self.clock(self.model, candidate)
        if ratio <= one.max_latency:
            return None
        return f"it takes {ratio:.3g} of the latency before, over {one.max_latency:g}"

    def _has_nothing_for(self, one: Pass) -> bool:
        if one.operators is None:
            return False
        return one.operators.isdisjoint(op_type for _, op_type in self._index.counts)

    def _clone(self) -> ir.Model:
        """A clone of the model, the last one again where the pass that had it left it alone.

        Whether it did is looked at: what a pass did and did not report must not reach the next.
        """
        if self._spare is None or _traits(self._spare) != self._model_traits:
            self._spare, self._model_traits = self.model.clone(), _traits(self.model)
        return self._spare

    def _try(self, one: Pass) -> Outcome:
        """Apply the pass to a clone, which becomes the model only when the gate lets it."""
        change = Change()
        if self._has_nothing_for(one):
            return change, "unchanged", None
        candidate, index, slow = self._clone(), None, None
        try:
            refusal = one.refuse(candidate, self.context)
            if refusal is not None:
                return change, "refused", refusal
            change = one.apply(candidate, self.context)
            if not change:
                return change, "unchanged", None
            index = self._tidied(candidate)
            reason = self.gate.why_rejected(candidate, one)
            slow = None if reason is not None else self._why_too_slow(candidate, one)
        except GraphoptError as error:
            reason = str(error)
        except Exception as error:  # a pass may be anyone's code: its faults belong in the ledger
            logger.debug("%s raised", one, exc_info=True)
            reason = f"{RAISED} {type(error).__name__}: {_first_words(str(error))}"
        made = None if index is None else candidate
        if not self._goes_on_from(made, one, reason) or index is None:
            self._spare = None
            return change, "rolled back", reason
        if slow is not None:
            self._spare = None
            return change, "too slow", slow
        self.gate.accept()
        self._take(index)
        self._spare = None
        return change, "kept", None

    def _goes_on_from(self, candidate: ir.Model | None, one: Pass, reason: str | None) -> bool:
        return reason is None if self.witness is None else self.witness(one, candidate, reason)


def _first_words(message: str) -> str:
    """The message of an error, but for what goes on and on, as where it holds a whole graph."""
    first = message.strip().split("\n", 1)[0]
    return first if len(first) <= MESSAGE_MAXIMUM else f"{first[:MESSAGE_MAXIMUM]}..."


def _are_lossy(passes: Sequence[Pass]) -> bool:
    return all(one.effect is Effect.LOSSY for one in passes)


def _stages(plan: Plan) -> Iterator[tuple[Pass, ...]]:
    """The passes in groups that repeat together: lossless ones, and each lossy one by itself.

    What a lossy pass does is done once: a second time would find its own work to narrow.
    """
    for lossy, group in groupby(plan.passes, lambda one: one.effect is Effect.LOSSY):
        if lossy:
            yield from ((one,) for one in group)
        else:
            yield tuple(group)


def _unread_initializers(graphs: Iterable[ir.Graph]) -> set[str]:
    return {
        name
        for graph in graphs
        for name, value in graph.initializers.items()
        if not (value.uses() or value.is_graph_output() or value.is_graph_input())
    }


def _drop_orphans(unread_before: set[str], graphs: Sequence[ir.Graph]) -> None:
    """Remove the initializers that lost their last reader: what a pass replaced is not stored."""
    orphans = _unread_initializers(graphs) - unread_before
    if not orphans:
        return
    for graph in graphs:
        for name in [name for name in graph.initializers if name in orphans]:
            del graph.initializers[name]


def _lacks_types(graphs: Iterable[ir.Graph]) -> bool:
    """A pass made values and left it to inference to say what they are."""
    for graph in graphs:
        for node in graph:
            for value in node.outputs:
                if value.type is None and value.name and node.domain in ONNX_DOMAINS:
                    return True
    return False


def _lacks_sizes(graphs: Iterable[ir.Graph]) -> bool:
    """Of some value a dimension has neither a size nor a name, which inference may find now."""
    for graph in graphs:
        for node in graph:
            for value in node.outputs:
                shape = known_shape(value)
                if shape is None or shape.has_unknown_dim():
                    return True
    return False


def _traits(model: ir.Model) -> list[object]:
    """All that a pass can change of a model, as far as it is cheap to compare with a clone's.

    Clones share tensors and attributes, so these are told apart by identity.
    """
    traits: list[object] = [list(model.functions), dict(model.opset_imports), model.ir_version]
    traits += [model.doc_string, list(model.metadata_props.items())]
    for graph in graphs_and_functions(model):
        traits += [graph.name, graph.doc_string, list(graph.metadata_props.items())]
        traits += [(v.name, str(v.type), str(v.shape)) for v in (*graph.inputs, *graph.outputs)]
        traits += [(v.name, id(v.const_value)) for v in graph.initializers.values()]
        traits += map(_node_traits, graph)
    return traits


def _node_traits(node: ir.Node) -> tuple[object, ...]:
    return (
        node.name,
        node.domain,
        node.op_type,
        [v.name if v is not None else None for v in node.inputs],
        [v.name for v in node.outputs],
        [(a.name, None if a.type in _GRAPHS else id(a)) for a in attributes_of(node)],
        node.doc_string,
        list(node.metadata_props.items()),
    )
