"""merge-reshapes: merge Reshape, Flatten, Squeeze and Unsqueeze that follow one another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import all_graphs, is_onnx, opset_of
from graphopt.rewriting import (
    Names,
    add_initializer,
    can_replace,
    input_of,
    replace_value,
    small_integers,
    stated_integers,
    why_too_old,
)
from graphopt.skeleton import known_shape

FIRST_OPSET = 5
"""Before it, the shape of Reshape is an attribute."""

FIRST_IR_VERSION = 4
"""Before it, every initializer is an input as well, and a pass adds no inputs."""

AXES_ARE_INPUTS = 13
"""From this opset on, the axes of Squeeze and Unsqueeze are an input."""

HAS_ALLOWZERO = 14
"""From this opset on, Reshape can be told that 0 stands for 0."""

LONGEST_RUN = 8
"""How many nodes are looked at together; a longer run takes several steps."""


@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Merge runs of nodes that only change the shape into one node, or into none.

    That is Reshape, Flatten, Squeeze, Unsqueeze, and a Transpose that only moves dimensions of
    size 1 when it is next to one of those. A run becomes a Reshape to a constant shape, or one
    Squeeze or Unsqueeze; where it ends in the shape that it began with, it goes. Nodes inside a
    run that others read stay.

    The shape that a run ends in is computed from the shape that it begins with. At run time a
    dimension that is not known may be 0, and then -1 next to it has no meaning: -1 is written only
    beside dimensions that are known and not 0, or where it stood already.
    """

    name: ClassVar[str] = "merge-reshapes"
    effect: ClassVar[Effect] = Effect.EXACT

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Where the shape of Reshape cannot be an initializer."""
        if model.ir_version < FIRST_IR_VERSION:
            return f"IR version {model.ir_version} has no constant initializers; raise it first"
        return why_too_old(model, FIRST_OPSET)

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge every run into its last node."""
        change = Change()
        names, opset = Names(model), opset_of(model)
        for graph in all_graphs(model):
            # Backwards, so that a run is seen as a whole and becomes one node at once.
            for node in reversed(graph):
                while node.graph is graph and _merge_into(node, opset, names, change):
                    pass
        return change


def _merge_into(node: ir.Node, opset: int, names: Names, change: Change) -> bool:
    """Let the node do what it and the nodes before it do; say whether it now does."""
    run = _run_to(node)
    if len(run) < 2 or all(is_onnx(n, "Transpose") for n in run):
        return False
    for start in range(len(run) - 1):
        part = run[start:]
        form = _form_of(part, opset)
        if form is None:
            continue
        _become(node, part[0].inputs[0], form, opset, names)
        _remove_unread(part[:-1])
        change.count("run that changes nothing removed" if form == IDENTITY else "run merged")
        return True
    change.skip(node, "its shape is not known well enough to merge it with the nodes before it")
    return False


def _run_to(node: ir.Node) -> list[ir.Node]:
    """The nodes of one graph that change the shape one after the other and end in this one."""
    run: list[ir.Node] = []
    maker: ir.Node | None = node
    while maker is not None and maker.graph is node.graph and len(run) < LONGEST_RUN:
        if not _only_reshapes(maker):
            break
        run.append(maker)
        maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
    return run[::-1]


def _only_reshapes(node: ir.Node) -> bool:
    """All elements stay where they are in memory, as far as can be told."""
    if not is_onnx(node, *_STEPS) or not node.inputs or _keeps_layout(node):
        return False
    if not is_onnx(node, "Transpose"):
        return True
    sizes = _sizes_before(node.inputs[0])
    return sizes is not None and _after_transpose(node, sizes, sizes) is not None


def _keeps_layout(node: ir.Node) -> bool:
    """A Flatten that quantize-static writes between two Transposes, to keep them from cancelling.

    By the pair, onnxruntime knows in which order the codes of an image are to lie.
    """
    value = node.inputs[0]
    if not is_onnx(node, "Flatten") or value is None or value.dtype != ir.DataType.UINT8:
        return False
    maker = value.producer()
    return maker is not None and is_onnx(maker, "Transpose")


# ------------------------------------------------------------------ what a run does to a shape


@dataclass(frozen=True)
class _Same:
    """The size of the run's input along an axis, whatever it is at run time."""

    axis: int


Size = int | _Same | None
"""A dimension after some nodes of a run; None when it is none of these."""

Sizes = tuple[Size, ...]


def _sizes_before(value: ir.Value | None) -> Sizes | None:
    shape = known_shape(value)
    if shape is None:
        return None
    return tuple(d if isinstance(d, int) else _Same(i) for i, d in enumerate(shape))


def _sizes_after(run: list[ir.Node], before: Sizes) -> Sizes | None:
    """The shape that the run makes of `before`; None when not even the rank is known."""
    sizes: Sizes | None = before
    for node in run:
        if sizes is None:
            return None
        sizes = _STEPS[node.op_type](node, sizes, before)
    return sizes


def _after_reshape(node: ir.Node, sizes: Sizes, before: Sizes) -> Sizes | None:
    target = _target(node)
    if target is None:
        return _inferred_shape(node, before)
    copies = node.attributes.get_int("allowzero", 0) == 0
    result: list[Size] = []
    for position, size in enumerate(target):
        if size < -1 or (size == 0 and copies and position >= len(sizes)):
            return None
        result.append(sizes[position] if size == 0 and copies else size)
    if result.count(-1) != 1:
        return None if -1 in result else tuple(result)
    place = result.index(-1)
    result[place] = _quotient(before, [*result[:place], *result[place + 1 :]])
    return tuple(result)


def _target(node: ir.Node) -> tuple[int, ...] | None:
    """The shape that a Reshape asks for, if it is constant."""
    return small_integers(input_of(node, 1))


def _inferred_shape(node: ir.Node, before: Sizes) -> Sizes | None:
    """What was inferred for a Reshape to a computed shape.

    Not what follows from a shape that callers can override.
    """
    shape = known_shape(node.outputs[0])
    if shape is None:
        return None
    if any(v is not None and v.is_initializer() for v in node.inputs[1:]):
        return None
    result: list[Size] = [d if isinstance(d, int) else None for d in shape]
    if result.count(None) == 1:
        place = result.index(None)
        result[place] = _quotient(before, [*result[:place], *result[place + 1 :]])
    return tuple(result)


def _quotient(before: Sizes, others: Sequence[Size]) -> Size:
    """The dimension that, with the others, makes up the number of elements there are.

    Dimensions of the run's input cancel, as do equal products of known ones.
    """
    unknown = Counter(s for s in before if isinstance(s, _Same))
    unknown.subtract(s for s in others if isinstance(s, _Same))
    dividend = math.prod(s for s in before if isinstance(s, int))
    divisor = math.prod(s for s in others if isinstance(s, int))
    left = list(unknown.elements())
    if None in others or min(unknown.values(), default=0) < 0 or dividend == 0 or divisor == 0:
        return None
    if not left:
        return dividend // divisor if dividend % divisor == 0 else None
    return left[0] if len(left) == 1 and dividend == divisor else None


def _after_flatten(node: ir.Node, sizes: Sizes, before: Sizes) -> Sizes | None:
    axis = node.attributes.get_int("axis", 1)
    if not -len(sizes) <= axis <= len(sizes):
        return None
    axis += len(sizes) if axis < 0 else 0
    return _product(sizes[:axis]), _product(sizes[axis:])


def _product(sizes: Sizes) -> Size:
    known = math.prod(s for s in sizes if isinstance(s, int))
    others = [s for s in sizes if not isinstance(s, int)]
    if not others or known == 0:
        return known
    return others[0] if len(others) == 1 and known == 1 else None


def _after_squeeze(node: ir.Node, sizes: Sizes, before: Sizes) -> Sizes | None:
    axes = stated_integers(node, "axes", 1)
    if axes is None:
        return None
    if not axes:
        # Without axes every 1 goes, so every other size must be known not to be 1.
        known = all(isinstance(s, int) for s in sizes)
        return tuple(s for s in sizes if s != 1) if known else None
    places = _places(axes, len(sizes))
    if places is None or any(isinstance(sizes[p], int) and sizes[p] != 1 for p in places):
        return None
    return tuple(s for i, s in enumerate(sizes) if i not in places)


def _after_unsqueeze(node: ir.Node, sizes: Sizes, before: Sizes) -> Sizes | None:
    axes = stated_integers(node, "axes", 1)
    rank = len(sizes) + len(axes or ())
    places = _places(axes, rank) if axes is not None else None
    if places is None:
        return None
    kept = iter(sizes)
    return tuple(1 if i in places else next(kept) for i in range(rank))


def _places(axes: Sequence[int], rank: int) -> set[int] | None:
    """The axes counted from the front; None when one is out of range or there twice."""
    places = {axis + rank if axis < 0 else axis for axis in axes}
    valid = len(places) == len(axes) and all(0 <= place < rank for place in places)
    return places if valid else None


def _after_transpose(node: ir.Node, sizes: Sizes, before: Sizes) -> Sizes | None:
    """Moving dimensions of size 1 past others leaves all elements where they are."""
    order = node.attributes.get_ints("perm", tuple(reversed(range(len(sizes)))))
    if sorted(order) != list(range(len(sizes))):
        return None
    moved = [axis for axis in order if sizes[axis] != 1]
    return tuple(sizes[axis] for axis in order) if moved == sorted(moved) else None


_STEPS: dict[str, Callable[[ir.Node, Sizes, Sizes], Sizes | None]] = {
    "Flatten": _after_flatten,
    "Reshape": _after_reshape,
    "Squeeze": _after_squeeze,
    "Transpose": _after_transpose,
    "Unsqueeze": _after_unsqueeze,
}
"""By operator, the sizes after a node from those before it and those before the run."""


# ------------------------------------------------------------------ one node that does the same


@dataclass(frozen=True)
class _Form:
    """The node that a run becomes.

    Attributes:
        op_type: Identity, Reshape, Squeeze or Unsqueeze.
        numbers: the shape, or the axes.
        allowzero: of Reshape: 0 stands for 0.
    """

    op_type: str
    numbers: tuple[int, ...] = ()
    allowzero: bool = False


IDENTITY = _Form("Identity")


def _form_of(run: list[ir.Node], opset: int) -> _Form | None:
    """The one node for the run, or None when there is none."""
    before = _sizes_before(run[0].inputs[0])
    after = _sizes_after(run, before) if before is not None else None
    if before is None or after is None:
        return None
    if before == after:
        return IDENTITY
    by_axes = _by_axes(before, after)
    if by_axes is not None and all(is_onnx(n, "Squeeze", "Unsqueeze") for n in run):
        return by_axes
    return _by_shape(run[-1], before, after, opset) or by_axes


def _by_axes(before: Sizes, after: Sizes) -> _Form | None:
    added, removed = _extra(after, before), _extra(before, after)
    if added is not None and all(after[axis] == 1 for axis in added):
        return _Form("Unsqueeze", added)
    # What went from a tensor with elements, and was not known to be 1, was 1 nevertheless.
    return _Form("Squeeze", removed) if removed is not None and 0 not in after else None


def _extra(longer: Sizes, shorter: Sizes) -> tuple[int, ...] | None:
    """The axes without which the longer shape is the shorter; each may be 1."""
    axes = []
    rest = list(reversed(shorter))
    for axis, size in enumerate(longer):
        if rest and size is not None and size == rest[-1]:
            rest.pop()
        elif size == 1 or isinstance(size, _Same):
            axes.append(axis)
        else:
            return None
    return None if rest else tuple(axes)


def _by_shape(last: ir.Node, before: Sizes, after: Sizes, opset: int) -> _Form | None:
    known = tuple(s if isinstance(s, int) else -1 for s in after)
    unknown = [i for i, s in enumerate(after) if not isinstance(s, int)]
    if 0 in known:
        if unknown:
            return None
        copied = all(before[i : i + 1] == (0,) for i, s in enumerate(after) if s == 0)
        return _Form("Reshape", known, not copied) if copied or opset >= HAS_ALLOWZERO else None
    if len(unknown) <= 1:
        return _Form("Reshape", known)
    moved = [i for i in unknown if after[i] != _Same(i)]
    if len(moved) > 1 or (moved and not _infers(last, moved[0])):
        return None
    copies = set(unknown) - set(moved)
    return _Form("Reshape", tuple(0 if i in copies else s for i, s in enumerate(known)))


def _infers(node: ir.Node, axis: int) -> bool:
    """The node is a Reshape with -1 at this place, so no dimension beside it can be 0."""
    if not is_onnx(node, "Reshape"):
        return False
    target = _target(node)
    return target is not None and target[axis] == -1


# ------------------------------------------------------------------ rewriting


def _become(node: ir.Node, source: ir.Value | None, form: _Form, opset: int, names: Names) -> None:
    """Turn the last node of a run into the one that does it all."""
    assert source is not None and isinstance(node.graph, ir.Graph)
    if form == IDENTITY and can_replace(node.outputs[0], source):
        replace_value(node.outputs[0], source)
        node.graph.remove(node, safe=True)
        return
    node.replace_input_with(0, source)
    if _is_already(node, form):
        return
    node.op_type = form.op_type
    node.attributes.clear()
    node.resize_inputs(1)
    if form == IDENTITY:
        return
    if form.allowzero:
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 1)
    if form.op_type != "Reshape" and opset < AXES_ARE_INPUTS:
        node.attributes["axes"] = ir.AttrInt64s("axes", form.numbers)
        return
    what = "shape" if form.op_type == "Reshape" else "axes"
    name = names.new(f"{node.outputs[0].name}_{what}")
    node.resize_inputs(2)
    numbers = add_initializer(node.graph, np.asarray(form.numbers, np.int64), name)
    node.replace_input_with(1, numbers)


def _is_already(node: ir.Node, form: _Form) -> bool:
    """The node is of that form; only its input was another."""
    if not is_onnx(node, "Reshape") or form.op_type != "Reshape":
        return False
    if (node.attributes.get_int("allowzero", 0) != 0) != form.allowzero:
        return False
    return _target(node) == form.numbers


def _remove_unread(nodes: list[ir.Node]) -> None:
    for node in reversed(nodes):
        if node.outputs[0].uses() or node.outputs[0].is_graph_output():
            return
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)
