"""What is wrong where an error begins, in words: overflow, clipping, constants that changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.contract import describe
from graphopt.cutting import cut_out, depend_on_inputs
from graphopt.errors import GraphoptError
from graphopt.operators import is_onnx
from graphopt.rewriting import constant_tensor, input_of
from graphopt.runtime import Reference, Session

CLIPPED_SHARE = 1e-3
"""Of the elements; fewer that are out of range are no cause."""

FEW_CODES = 4
"""A range of which values use fewer codes is far too wide."""


def finite_maximum(dtype: ir.DataType | None) -> float | None:
    """The largest number of a floating-point type; None for other types."""
    if dtype is None or not dtype.is_floating_point():
        return None
    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]


def why_not_finite(right: np.ndarray, wrong: np.ndarray, dtype: ir.DataType | None) -> str | None:
    """What became infinite or no number, and the range of the original's values; or None.

    Args:
        right: a floating-point value of the original.
        wrong: what the other model computes for it.
        dtype: element type in which the other model does.
    """
    if right.shape != wrong.shape or right.dtype.kind in "biuOSU" or wrong.dtype.kind in "biuOSU":
        return None
    finite = np.isfinite(right.astype(np.float64))
    appeared = finite & ~np.isfinite(wrong.astype(np.float64))
    if not appeared.any():
        return None
    what = "NaN" if np.isnan(wrong.astype(np.float64)[appeared]).all() else "infinity"
    magnitude = float(np.abs(right.astype(np.float64)[finite]).max())
    limit = finite_maximum(dtype)
    name = dtype.name.lower() if dtype is not None else str(wrong.dtype)
    size = f"the original's largest magnitude is {magnitude:,.6g}"
    text = f"{what} appears in {int(appeared.sum()):,} of {right.size:,} elements; {size}"
    if limit is not None and magnitude > limit:
        text += f", over {limit:,.6g}, the largest of {name}"
    return text


def why_clipped(node: ir.Node, seen: np.ndarray) -> str | None:
    """What is wrong with the range of a QuantizeLinear, given the values it should keep; or None.

    Args:
        node: a QuantizeLinear.
        seen: its input in the original.
    """
    scale = _constant(input_of(node, 1))
    if scale is None or scale.ndim > 1 or not seen.size:
        return None
    zero = input_of(node, 2)
    kind = zero.dtype if zero is not None else node.outputs[0].dtype or ir.DataType.UINT8
    point = _constant(zero)
    if kind is None or not kind.is_integer() or (zero is not None and point is None):
        return None
    numbers = np.zeros_like(scale) if point is None else point.astype(np.float64)
    wide, values = _along(node, scale.astype(np.float64), seen), seen.astype(np.float64)
    offset = _along(node, numbers.astype(np.float64), seen)
    low, high = ((limit - offset) * wide for limit in (float(kind.min), float(kind.max)))
    outside = float(((values < low - wide / 2) | (values > high + wide / 2)).mean())
    name = f"{describe(node)!r}: scale {_span_text(scale)} of {kind.name.lower()}"
    ranges = f"range [{low.min():.4g}, {high.max():.4g}]"
    span = f"the original's values go from {values.min():.4g} to {values.max():.4g}"
    if outside > CLIPPED_SHARE:
        return f"{name} gives the {ranges}; {span}, and {outside:.1%} of them are clipped"
    codes = float((np.ptp(values) / wide.max()) + 1)
    if codes < FEW_CODES:
        return f"{name} gives the {ranges}; {span}, and use {codes:.1f} of its codes"
    return None


def _span_text(scale: np.ndarray) -> str:
    low, high = float(scale.min()), float(scale.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _along(node: ir.Node, numbers: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Numbers for each channel, such that they broadcast against the values."""
    if numbers.size == 1:
        return numbers.reshape(())
    axis = node.attributes.get_int("axis", 1) % seen.ndim
    return numbers.reshape([-1 if a == axis else 1 for a in range(seen.ndim)])


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def changed_constants(
    before: ir.Model, after: ir.Model, old: ir.Node | None, new: ir.Node | None
) -> Iterator[str]:
    """How the constant inputs of a node differ from those of the same node of the original.

    Args:
        before: the original.
        after: the rewritten model.
        old: the node of the original; None where there is none.
        new: the node of the rewritten model, likewise.
    """
    if old is None or new is None or (old.domain, old.op_type) != (new.domain, new.op_type):
        return
    moving = depend_on_inputs(before.graph) | depend_on_inputs(after.graph)
    for index in range(max(len(old.inputs), len(new.inputs))):
        was, now = input_of(old, index), input_of(new, index)
        if was in moving or now in moving or (was is None and now is None):
            continue
        if was is None or now is None:
            fate = "is new" if was is None else "is gone"
            yield f"input {index} ({(was or now).name}) {fate}"  # type: ignore[union-attr]
            continue
        text = _difference(_computed(before, was), _computed(after, now))
        if text is not None:
            yield f"the constant {now.name!r} (input {index}) {text}"


def _computed(model: ir.Model, value: ir.Value) -> np.ndarray | None:
    """The array of a constant, also of one that nodes compute; None where they do not run."""
    if value.producer() is None or constant_tensor(value) is not None:
        return _constant(value)
    try:
        session = Session(cut_out(model, {}, {value.name or "": "value"}), Reference.AS_WRITTEN)
        return session.run({}).get("value")
    except GraphoptError:
        return None


def _difference(was: np.ndarray | None, now: np.ndarray | None) -> str | None:
    if was is None or now is None or was.dtype.kind in "OSU" or now.dtype.kind in "OSU":
        return None
    if was.shape != now.shape:
        return f"has dimensions {list(now.shape)}, and had {list(was.shape)}"
    first, second = was.astype(np.float64), now.astype(np.float64)
    if np.array_equal(first, second, equal_nan=True) or not first.size:
        return None
    norm, apart = float(np.linalg.norm(first)), float(np.linalg.norm(first - second))
    relative = f"relative L2 {apart / norm:.3g}" if norm else f"L2 {apart:.3g} from zeros"
    return f"differs from the original's by {relative}"


def causes(
    before: ir.Model,
    after: ir.Model,
    ends: tuple[ir.Value, ir.Value],
    nodes: Sequence[ir.Node],
    known: Mapping[str, np.ndarray],
    arrays: tuple[np.ndarray, np.ndarray],
) -> tuple[str, ...]:
    """What is wrong with a stretch, as far as it can be told.

    Args:
        before: the original.
        after: the rewritten model.
        ends: the value that is wrong, in both.
        nodes: of the stretch, in the rewritten model.
        known: values of the original by their names in the rewritten model.
        arrays: the value in the original, and what the stretch makes of the original's values.
    """
    found = [why_not_finite(*arrays, ends[1].dtype)]
    for node in nodes:
        source = input_of(node, 0)
        seen = None if source is None else known.get(source.name or "")
        if is_onnx(node, "QuantizeLinear") and seen is not None:
            found.append(why_clipped(node, seen))
    found += changed_constants(before, after, ends[0].producer(), ends[1].producer())
    return tuple(text for text in found if text is not None)
