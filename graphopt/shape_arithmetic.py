"""What each operator does to shape arithmetic, element by element; see `graphopt.shape_facts`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphopt.rewriting import input_of, small_array
from graphopt.shape_rules import FOLLOWED, INTEGERS, LARGEST_CONTENT, Fact, Rule, Shape, broadcast
from graphopt.sizes import Size, difference, may_not_be_negative, sign, total

if TYPE_CHECKING:
    from graphopt.shape_facts import ShapeFacts


def _shape_of(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    shape = facts.shape(input_of(node, 0))
    if shape is None:
        return None
    start = node.attributes.get_int("start", 0)
    part = shape[start : node.attributes.get_int("end", len(shape))]
    return Fact((len(part),), part)


def _size_of(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    shape = facts.shape(input_of(node, 0))
    return None if shape is None else Fact((), (facts.algebra.products(shape),))


def _cast(facts: ShapeFacts, node: ir.Node) -> Fact:
    fact = facts.of(input_of(node, 0))
    source, target = (v.dtype if v is not None else None for v in (node.inputs[0], node.outputs[0]))
    keeps = source == target or (source is ir.DataType.INT32 and target is ir.DataType.INT64)
    # From 64 to 32 bits, dimensions keep their value: no tensor is that large.
    keeps |= source is ir.DataType.INT64 and target is ir.DataType.INT32 and _fits(fact.content)
    keeps |= source is ir.DataType.BOOL and target in INTEGERS
    return Fact(fact.shape, fact.content if keeps else None)


def _fits(content: Shape | None) -> bool:
    return content is not None and all(
        -(2**31) <= size < 2**31 if isinstance(size, int) else may_not_be_negative(size)
        for size in content
    )


def _elementwise(
    combine: Callable[[ShapeFacts, Size, Size], Size | None], facts: ShapeFacts, node: ir.Node
) -> Fact:
    shape = broadcast(facts, node).shape
    if len(node.inputs) != 2 or node.outputs[0].dtype not in FOLLOWED:
        return Fact(shape)
    first, second = (facts.of(value) for value in node.inputs)
    if shape is None or len(shape) > 1 or first.content is None or second.content is None:
        return Fact(shape)
    count = shape[0] if shape else 1
    if not isinstance(count, int) or count > LARGEST_CONTENT:
        return Fact(shape)
    pairs = [(c * count if len(c) == 1 else c) for c in (first.content, second.content)]
    if any(len(content) != count for content in pairs):
        return Fact(shape)
    combined = [combine(facts, a, b) for a, b in zip(*pairs, strict=True)]
    known = tuple(size for size in combined if size is not None)
    return Fact(shape, known if len(known) == count else None)


def _add(facts: ShapeFacts, first: Size, second: Size) -> Size:
    return total(first, second)


def _subtract(facts: ShapeFacts, first: Size, second: Size) -> Size:
    return difference(first, second)


def _multiply(facts: ShapeFacts, first: Size, second: Size) -> Size:
    return facts.algebra.product(first, second)


def _divide(facts: ShapeFacts, first: Size, second: Size) -> Size | None:
    return None if second == 0 else facts.algebra.quotient(first, second)


def _remainder(facts: ShapeFacts, first: Size, second: Size) -> Size | None:
    if isinstance(first, int) and isinstance(second, int) and second > 0 and first >= 0:
        return first % second
    if second == 0:
        return None
    is_dimension = may_not_be_negative(first) and may_not_be_negative(second)
    return facts.algebra.atom(("Mod", first, second), is_dimension)


def _larger(facts: ShapeFacts, first: Size, second: Size) -> Size | None:
    if may_not_be_negative(difference(first, second)):
        return first
    return second if may_not_be_negative(difference(second, first)) else None


def _smaller(facts: ShapeFacts, first: Size, second: Size) -> Size | None:
    if may_not_be_negative(difference(first, second)):
        return second
    return first if may_not_be_negative(difference(second, first)) else None


def _is_equal(facts: ShapeFacts, first: Size, second: Size) -> Size | None:
    found = sign(difference(first, second))
    return None if found is None else int(found == 0)


def _compared(
    holds: Callable[[int], bool], facts: ShapeFacts, first: Size, second: Size
) -> Size | None:
    apart = difference(first, second)
    found = sign(apart)
    if found is not None:
        return int(holds(found))
    if may_not_be_negative(apart) and holds(0) == holds(1):
        return int(holds(0))
    if may_not_be_negative(difference(0, apart)) and holds(0) == holds(-1):
        return int(holds(0))
    return None


def _and(facts: ShapeFacts, first: Size, second: Size) -> Size:
    return first if first == 0 else second


def _or(facts: ShapeFacts, first: Size, second: Size) -> Size:
    return first if first == 1 else second


def _negated(facts: ShapeFacts, node: ir.Node) -> Fact:
    fact = facts.of(input_of(node, 0))
    change = (lambda s: 1 - s) if node.op_type == "Not" else partial(difference, 0)
    content = tuple(map(change, fact.content)) if fact.content is not None else None
    return Fact(fact.shape, content)


def _where(facts: ShapeFacts, node: ir.Node) -> Fact:
    shape = broadcast(facts, node).shape
    parts = [facts.content(value) for value in node.inputs]
    if shape is None or len(shape) > 1 or any(part is None for part in parts):
        return Fact(shape)
    count = shape[0] if shape else 1
    if not isinstance(count, int):
        return Fact(shape)
    condition, yes, no = (p * count if len(p) == 1 else p for p in parts if p is not None)
    if not len(condition) == len(yes) == len(no) == count:
        return Fact(shape)
    return Fact(shape, tuple(y if c else n for c, y, n in zip(condition, yes, no, strict=True)))


def _constant(facts: ShapeFacts, node: ir.Node) -> Fact | None:
    array = small_array(node.outputs[0], LARGEST_CONTENT)
    if array is None:
        return None
    integers = array.ndim < 2 and array.dtype.kind in "ib"
    content = tuple(int(number) for number in array.reshape(-1)) if integers else None
    return Fact(tuple(array.shape), content)


RULES: dict[str, Rule] = {
    "Add": partial(_elementwise, _add),
    "And": partial(_elementwise, _and),
    "Cast": _cast,
    "Constant": _constant,
    "Div": partial(_elementwise, _divide),
    "Equal": partial(_elementwise, _is_equal),
    "Greater": partial(_elementwise, partial(_compared, lambda s: s > 0)),
    "GreaterOrEqual": partial(_elementwise, partial(_compared, lambda s: s >= 0)),
    "Less": partial(_elementwise, partial(_compared, lambda s: s < 0)),
    "LessOrEqual": partial(_elementwise, partial(_compared, lambda s: s <= 0)),
    "Max": partial(_elementwise, _larger),
    "Min": partial(_elementwise, _smaller),
    "Mod": partial(_elementwise, _remainder),
    "Mul": partial(_elementwise, _multiply),
    "Neg": _negated,
    "Not": _negated,
    "Or": partial(_elementwise, _or),
    "Shape": _shape_of,
    "Size": _size_of,
    "Sub": partial(_elementwise, _subtract),
    "Where": _where,
}
"""By operator."""
