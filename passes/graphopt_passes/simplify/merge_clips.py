"""merge-clips: merge Clip, Relu, Min and Max with constants into one Clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.rewriting import input_of, small_array
from graphopt.skeleton import known_shape
from graphopt_passes.simplify.chains import Rewriter, maker_for, why_refused
from graphopt_passes.simplify.no_change import broadcasts_into

OPERATORS = ("Clip", "Max", "Min", "Relu")


@dataclass(frozen=True)
class MergeClips(Pass):
    """Merge Clip, Relu, Min and Max with constants that follow one another into one Clip.

    All of them map x to min(max(x, low), high), and so does the second after the first, with the
    bounds of the first brought between those of the second. That holds bit for bit: NaN passes
    all of them, and Clip without a bound has the largest number, not infinity, in its place. One
    thing differs: Max(x, 0) makes 0.0 of -0.0 and Clip and Relu do not, so that Min and Max with
    0 stay.
    """

    name: ClassVar[str] = "merge-clips"
    effect: ClassVar[Effect] = Effect.EXACT

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets state the bounds of Clip in attributes, and clip no integers."""
        return why_refused(model)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge every such node with the one before it, from the inputs onwards."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_merge_into, *OPERATORS)
        return rewriter.change


def _merge_into(node: ir.Node, rewriter: Rewriter) -> None:
    outer = _limits_of(node)
    first = maker_for(outer.value, node, *OPERATORS) if outer is not None else None
    inner = _limits_of(first) if first is not None else None
    if outer is None or inner is None:
        return
    if is_onnx(node, "Relu") and first is not None and is_onnx(first, "Relu"):
        return
    low, high = outer.clip(inner.low), outer.clip(inner.high)
    if low == high == 0 and not inner.low <= 0 <= inner.high:
        # Both bring -0.0 to 0.0, by way of another number; one Clip leaves it.
        return
    bounds = [rewriter.constant(node, low, "min"), rewriter.constant(node, high, "max")]
    rewriter.become(node, "Clip", [inner.value, *bounds])
    rewriter.change.count("merged into one Clip")


@dataclass(frozen=True)
class _Limits:
    """A node that maps a value to min(max(value, low), high)."""

    value: ir.Value
    low: np.ndarray
    high: np.ndarray

    def clip(self, bound: np.ndarray) -> np.ndarray:
        """What the node makes of a bound; where equal, the bound stays, as do the signs of 0."""
        return self.low if bound < self.low else self.high if bound > self.high else bound


def _limits_of(node: ir.Node) -> _Limits | None:
    value = node.inputs[0]
    dtype = node.outputs[0].dtype
    if dtype is None or dtype == ir.DataType.BFLOAT16 or dtype.numpy().kind not in "fiu":
        return None
    if is_onnx(node, "Min", "Max"):
        return _limits_of_extremum(node, dtype.numpy())
    if is_onnx(node, "Relu") and value is not None:
        return _Limits(value, np.array(0, dtype.numpy()), _end_of(dtype.numpy(), np.inf))
    low, high = _bound(node, 1, dtype.numpy()), _bound(node, 2, dtype.numpy())
    if value is None or low is None or high is None or not low <= high:
        return None
    return _Limits(value, low, high)


def _limits_of_extremum(node: ir.Node, dtype: np.dtype) -> _Limits | None:
    if len(node.inputs) != 2:
        return None
    for value, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        bound = small_array(other, 1)
        if value is None or bound is None or bound.size != 1 or not bound.any():
            continue
        if np.isnan(bound).any() or not broadcasts_into(bound.shape, known_shape(value)):
            continue
        if is_onnx(node, "Max"):
            return _Limits(value, bound.reshape(()), _end_of(dtype, np.inf))
        return _Limits(value, _end_of(dtype, -np.inf), bound.reshape(()))
    return None


def _bound(node: ir.Node, index: int, dtype: np.dtype) -> np.ndarray | None:
    """A bound of a Clip; the largest or lowest finite number where it is left out."""
    value = input_of(node, index)
    if value is None:
        limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
        return np.array(limits.max if index == 2 else limits.min, dtype)
    array = small_array(value, 1)
    return None if array is None or array.size != 1 else array.reshape(())


def _end_of(dtype: np.dtype, infinity: float) -> np.ndarray:
    """Infinity, or for integers the last number on its side."""
    if dtype.kind == "f":
        return np.array(infinity, dtype)
    limits = np.iinfo(dtype)
    return np.array(limits.max if infinity > 0 else limits.min, dtype)
