"""merge-concats: merge Concats that follow one another, and those that undo a Slice or Split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.packing import is_constant
from graphopt.rewriting import can_replace, constant_tensor, replace_value
from graphopt_passes.simplify.chains import (
    Rewriter,
    axis_attribute,
    maker_for,
    part_of,
    rank_of,
    remove_if_unread,
    size_at,
    why_refused,
)


@dataclass(frozen=True)
class MergeConcats(Pass):
    """Merge Concats that follow one another, and those that put together what was one.

    - Concat(a, Concat(b, c), d) along one axis is Concat(a, b, c, d).
    - An operand that is a constant of size 0 along the axis adds nothing.
    - Neighbouring operands that are neighbouring parts of one value, by Slice or Split, are one
      part of it: the value itself where they are all of it, or a Slice where there are no others.
    """

    name: ClassVar[str] = "merge-concats"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Concat"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets state sizes and bounds in attributes."""
        return why_refused(model)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge every Concat with what is before it, from the inputs onwards."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_simplify, "Concat")
        return rewriter.change


def _simplify(node: ir.Node, rewriter: Rewriter) -> None:
    axis = _axis_of(node)
    if axis is not None:
        _merge_into(node, axis, rewriter)
        _drop_empty(node, axis, rewriter)
        _rejoin(node, axis, rewriter)


def _merge_into(node: ir.Node, axis: int, rewriter: Rewriter) -> None:
    operands: list[ir.Value | None] = []
    for value in node.inputs:
        before = maker_for(value, node, "Concat")
        merges = before is not None and _axis_of(before) == axis
        operands += before.inputs if before is not None and merges else [value]
    if len(operands) > len(node.inputs):
        rewriter.become(node, "Concat", operands, list(node.attributes.values()))
        rewriter.change.count("Concats merged")


def _drop_empty(node: ir.Node, axis: int, rewriter: Rewriter) -> None:
    kept = [value for value in node.inputs if not _is_empty(value, axis)]
    if kept and len(kept) < len(node.inputs):
        rewriter.become(node, "Concat", kept, list(node.attributes.values()))
        rewriter.change.count("empty operand dropped")


def _is_empty(value: ir.Value | None, axis: int) -> bool:
    if not is_constant(value):
        return False
    tensor = constant_tensor(value)
    return tensor is not None and len(tensor.shape) > axis and tensor.shape[axis] == 0


def _axis_of(node: ir.Node) -> int | None:
    return axis_attribute(node, rank_of(node.inputs[0]))


# ------------------------------------------------------------------ parts put together again


def _rejoin(node: ir.Node, axis: int, rewriter: Rewriter) -> None:
    runs = _runs(node, axis)
    operands: list[ir.Value | None] = []
    for run in runs:
        whole = size_at(run.source, axis) == run.end - run.start and len(run.operands) > 1
        operands += [run.source] if whole else run.operands
    if len(runs) == 1 and len(runs[0].operands) > 1:
        _become_part(node, axis, runs[0], rewriter)
    elif len(operands) < len(node.inputs):
        rewriter.become(node, "Concat", operands, list(node.attributes.values()))
        rewriter.change.count("parts put together again")


@dataclass
class _Run:
    """Neighbouring operands that are, one after the other, one part of a value."""

    source: ir.Value | None
    start: int
    end: int
    operands: list[ir.Value | None]


def _runs(node: ir.Node, axis: int) -> list[_Run]:
    runs: list[_Run] = []
    for value in node.inputs:
        part = part_of(value, node)
        if part is None or part.axis != axis:
            runs.append(_Run(None, 0, 0, [value]))
        elif runs and runs[-1].source is part.source and runs[-1].end == part.start:
            runs[-1].end = part.end
            runs[-1].operands.append(value)
        else:
            runs.append(_Run(part.source, part.start, part.end, [value]))
    return runs


def _become_part(node: ir.Node, axis: int, run: _Run, rewriter: Rewriter) -> None:
    """Concat of nothing but neighbouring parts is the value or a Slice of it."""
    source = run.source
    assert source is not None
    if size_at(source, axis) != run.end - run.start:
        numbers = {"starts": run.start, "ends": run.end, "axes": axis}
        constants = [rewriter.integers(node, [n], what) for what, n in numbers.items()]
        rewriter.become(node, "Slice", [source, *constants])
    elif can_replace(node.outputs[0], source):
        replace_value(node.outputs[0], source)
        remove_if_unread(node)
    else:
        rewriter.become(node, "Identity", [source])
    rewriter.change.count("parts put together again")
