"""merge-casts: merge Casts that follow one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.rewriting import can_replace, input_of, only_reader, replace_value, why_too_old
from graphopt_passes.simplify.chains import Rewriter, maker_of, remove_if_unread

FIRST_OPSET = 9
"""Before it, types are named by strings or NaN and infinity are not said to pass."""

T = ir.DataType

INTEGERS = (T.INT8, T.INT16, T.INT32, T.INT64, T.UINT8, T.UINT16, T.UINT32, T.UINT64)

DIGITS = {T.BFLOAT16: 8, T.FLOAT16: 11, T.FLOAT: 24, T.DOUBLE: 53}
"""Floating-point types, and up to how many bits an integer is represented exactly."""

WIDER = {
    T.BFLOAT16: (T.FLOAT, T.DOUBLE),
    T.FLOAT16: (T.FLOAT, T.DOUBLE),
    T.FLOAT: (T.DOUBLE,),
    T.DOUBLE: (),
}
"""Floating-point types that hold every value of another."""

MOVES = ("Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that move elements of any type, whatever they are."""


@dataclass(frozen=True)
class MergeCasts(Pass):
    """Merge Casts that follow one another where the first loses nothing.

    Cast(Cast(x, a), b) is Cast(x, b), or x itself when b is its type,

    - where every value of x's type is one of a: int32 in int64, uint8 in float16, bool in all;
    - where all are integers and b has no more bits than a: both keep the lowest bits.

    What a conversion leaves undefined stays as it is: from floating point to integers, because of
    NaN, infinity and numbers out of range, unless what comes is known to be a small integer. Only
    types that all runtimes convert alike are looked at: no strings, nothing below 8 bits, no
    float8. Between the two may be nodes that only move elements and that nothing else reads.
    CastLike becomes Cast where the type is known.
    """

    name: ClassVar[str] = "merge-casts"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: ClassVar[frozenset[str] | None] = frozenset({"Cast", "CastLike"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Older opsets say less about what a Cast does."""
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge every Cast with the one before it, from the inputs onwards."""
        rewriter = Rewriter(model, context)
        rewriter.rewrite(_name_type, "CastLike")
        rewriter.rewrite(_merge_into, "Cast")
        return rewriter.change


def _name_type(node: ir.Node, rewriter: Rewriter) -> None:
    like = input_of(node, 1)
    if like is None or not (_is_plain(like.dtype) and _is_plain(node.outputs[0].dtype)):
        return
    assert like.dtype is not None
    rewriter.become(node, "Cast", node.inputs[:1], [ir.AttrInt64("to", like.dtype)])
    rewriter.change.count("CastLike made Cast")


def _is_plain(dtype: ir.DataType | None) -> bool:
    return dtype in INTEGERS or dtype in DIGITS or dtype == T.BOOL


def _merge_into(node: ir.Node, rewriter: Rewriter) -> None:
    first, reader = _cast_before(node)
    if first is None or first.inputs[0] is None:
        return
    source = first.inputs[0]
    if not all(_is_plain(v.dtype) for v in (source, first.outputs[0], node.outputs[0])):
        return
    assert source.dtype and first.outputs[0].dtype and node.outputs[0].dtype
    start, middle, end = source.dtype, first.outputs[0].dtype, node.outputs[0].dtype
    if reader is not node and start == T.BFLOAT16:
        # Not every runtime moves this type about.
        return
    if not merges(start, middle, end):
        rewriter.change.skip(
            node, f"{start} to {middle} to {end} is not the same as {start} to {end}"
        )
        return
    reader.replace_input_with(0, source)
    _retype(node, reader, start)
    rewriter.change.count("Casts merged")
    if start == end and node.inputs[0] is not None and can_replace(node.outputs[0], node.inputs[0]):
        replace_value(node.outputs[0], node.inputs[0])
        remove_if_unread(node)
    remove_if_unread(first)


def _cast_before(node: ir.Node) -> tuple[ir.Node | None, ir.Node]:
    """The Cast before a Cast, perhaps before nodes that move elements; and what reads it there."""
    reader = node
    maker = maker_of(node.inputs[0], node, "Cast", *MOVES)
    while maker is not None and not is_onnx(maker, "Cast"):
        if only_reader(maker.outputs[0]) is not reader:
            return None, reader
        reader, maker = maker, maker_of(maker.inputs[0], maker, "Cast", *MOVES)
    return maker, reader


def _retype(node: ir.Node, reader: ir.Node, dtype: ir.DataType) -> None:
    """What is moved between the Casts has the type that comes in."""
    while node is not reader:
        assert node.inputs[0] is not None
        maker = node.inputs[0].producer()
        assert maker is not None
        maker.outputs[0].type = ir.TensorType(dtype)
        node = maker


def merges(start: ir.DataType, middle: ir.DataType, end: ir.DataType) -> bool:
    """A Cast from start to middle to end is one from start to end, for every value."""
    if start == middle:
        return True
    if start in (*INTEGERS, T.BOOL) and middle in INTEGERS and end in INTEGERS:
        return _holds_all(middle, start) or end.bitwidth <= middle.bitwidth
    if not _holds_all(middle, start):
        return False
    # Floating point to integers: only where no value is out of range, which NaN always is.
    return end not in INTEGERS or middle not in DIGITS or _holds_all(end, start)


def _holds_all(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Every value of the narrow type is one of the wide type."""
    if wide == narrow or narrow == T.BOOL:
        return True
    if wide == T.BOOL:
        return False
    if narrow in DIGITS:
        return wide in WIDER[narrow]
    limits = np.iinfo(narrow.numpy())
    if wide in DIGITS:
        return limits.max.bit_length() <= DIGITS[wide]
    others = np.iinfo(wide.numpy())
    return bool(others.min <= limits.min and limits.max <= others.max)
