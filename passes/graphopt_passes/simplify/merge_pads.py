"""merge-pads: merge Pads that follow one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.rewriting import input_of, small_array, small_integers
from graphopt_passes.simplify.chains import Rewriter, axes_of, maker_for, rank_of, why_refused


@dataclass(frozen=True)
class MergePads(Pass):
    """Merge two Pads that add the same constant around a value into one.

    Pad(Pad(x, p), q) is Pad(x, p + q) where no number in p and q is negative: those crop.
    """

    name: ClassVar[str] = "merge-pads"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Pad"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets state pads in an attribute."""
        return why_refused(model)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge every Pad with the one before it, from the inputs onwards."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_merge_into, "Pad")
        return rewriter.change


def _merge_into(node: ir.Node, rewriter: Rewriter) -> None:
    first = maker_for(node.inputs[0], node, "Pad")
    if first is None:
        return
    outer, inner = _pads_of(node), _pads_of(first)
    if outer is None or inner is None or _value_of(node) is None:
        rewriter.change.skip(node, "it or the Pad before it does not add a known constant only")
        return
    if _value_of(node) != _value_of(first):
        rewriter.change.skip(node, "the Pad before it adds another value")
        return
    pads = rewriter.integers(node, [int(pad) for pad in outer + inner], "pads")
    inputs = [first.inputs[0], pads]
    if input_of(node, 2) is not None:
        inputs.append(node.inputs[2])
    rewriter.become(node, "Pad", inputs)
    rewriter.change.count("Pads merged")


def _pads_of(node: ir.Node) -> np.ndarray | None:
    """What is added at the beginning and end of every axis; None when not known or negative."""
    pads, rank = small_integers(input_of(node, 1)), rank_of(node.inputs[0])
    if pads is None or rank is None or node.attributes.get_string("mode", "constant") != "constant":
        return None
    stated = small_integers(input_of(node, 3)) if input_of(node, 3) is not None else range(rank)
    axes = axes_of(stated, rank)
    if axes is None or len(pads) != 2 * len(axes) or min(pads, default=0) < 0:
        return None
    result = np.zeros((2, rank), np.int64)
    result[:, list(axes)] = np.reshape(pads, (2, len(axes)))
    return result.reshape(-1)


def _value_of(node: ir.Node) -> bytes | None:
    """The bits of the constant that a Pad adds; None when it is computed."""
    value = input_of(node, 2)
    if value is None:
        dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
        return None if dtype in (None, ir.DataType.STRING) else bytes(max(1, dtype.bitwidth // 8))
    array = small_array(value, 1)
    return None if array is None or array.dtype == object else array.tobytes()
