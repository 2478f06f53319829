"""Runs passes, gates each, rolls back what breaks, and keeps the ledger."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.errors import CheckFailed, GraphoptError
from graphopt.gate import Gate
from graphopt.ledger import Size, Step, Verdict, size_of
from graphopt.operators import all_graphs, graphs_and_functions
from graphopt.recipes import Plan
from graphopt.skeleton import infer_shapes

logger = logging.getLogger("graphopt")

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)

ROUNDS_MAXIMUM = 20
"""A plan that repeats ends after so many rounds even where passes keep undoing one another."""


@dataclass
class Pipeline:
    """Passes at work on one model.

    Attributes:
        model: as far as it has come; replaced by a rewritten clone when the gate lets that.
        size: of the model.
        external_data: with which the model is going to be saved; see `graphopt.saving.save`.
        gate: judges every rewritten clone.
        context: for the passes.
        strict: raise where a pass is rejected.
        steps: the ledger.
    """

    model: ir.Model
    size: Size
    external_data: bool | None
    gate: Gate
    context: Context
    strict: bool = False
    steps: list[Step] = field(default_factory=list)
    _spare: ir.Model | None = None
    _model_traits: list[object] = field(default_factory=list)

    def run(self, plan: Plan) -> None:
        """Run all passes, in order, once or until none of them finds anything.

        A pass that was rejected or that refused is not asked again in later rounds.

        Raises:
            CheckFailed: `strict`, and the gate rejected a pass.
        """
        infer_shapes(self.model)
        waiting = list(plan.passes)
        for round_number in range(1, ROUNDS_MAXIMUM + 1):
            steps = [self._step(one, round_number) for one in waiting]
            self.steps += [s for s in steps if round_number == 1 or s.verdict != "unchanged"]
            if not plan.repeat or not any(s.kept for s in steps):
                return
            waiting = [
                p for p, s in zip(waiting, steps, strict=True) if s.verdict in ("kept", "unchanged")
            ]

    def _step(self, one: Pass, round_number: int) -> Step:
        started = time.perf_counter()
        self.context.progress(one.name)
        before = self.size
        change, verdict, reason = self._try(one)
        while verdict == "rolled back" and (narrower := one.narrow()) is not None:
            one = narrower
            change, verdict, reason = self._try(one)
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
        )

    def _clone(self) -> ir.Model:
        """A clone of the model, the last one again where the pass that had it left it alone.

        Whether it did is looked at: what a pass did and did not report must not reach the next.
        """
        if self._spare is None or _traits(self._spare) != self._model_traits:
            self._spare, self._model_traits = self.model.clone(), _traits(self.model)
        return self._spare

    def _try(self, one: Pass) -> tuple[Change, Verdict, str | None]:
        """Apply the pass to a clone, which becomes the model only when the gate lets it."""
        candidate = self._clone()
        change = Change()
        try:
            refusal = one.refuse(candidate, self.context)
            if refusal is not None:
                return change, "refused", refusal
            change = one.apply(candidate, self.context)
            if not change:
                return change, "unchanged", None
            _drop_orphans(self.model, candidate)
            reason = self.gate.why_rejected(candidate, one)
        except GraphoptError as error:
            reason = str(error)
        except Exception as error:  # a pass may be anyone's code: its faults belong in the ledger
            logger.debug("%s raised", one, exc_info=True)
            reason = f"it raised {type(error).__name__}: {error}"
        if reason is not None:
            self._spare = None
            return change, "rolled back", reason
        infer_shapes(candidate)
        self.model, self.size, self._spare = candidate, size_of(candidate, self.external_data), None
        return change, "kept", None


def _drop_orphans(before: ir.Model, after: ir.Model) -> None:
    """Remove the initializers that lost their last reader: what a pass replaced is not stored."""
    read = {v.name for g in all_graphs(before) for v in g.initializers.values() if v.uses()}
    for graph in all_graphs(after):
        for name, value in list(graph.initializers.items()):
            needed = value.uses() or value.is_graph_output() or value.is_graph_input()
            if name in read and not needed:
                del graph.initializers[name]


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
        [
            (name, None if attribute.type in _GRAPHS else id(attribute))
            for name, attribute in node.attributes.items()
        ],
        node.doc_string,
        list(node.metadata_props.items()),
    )
