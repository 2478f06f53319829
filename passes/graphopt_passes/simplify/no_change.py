"""When a node of an operator gives back its first input, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.operators import dropout_is_off, is_onnx
from graphopt.rewriting import input_of, small_array, stated_integers, static_shape
from graphopt.skeleton import known_shape

WHOLE = 2**31 - 1
"""A slice that ends here takes everything: no dimension is larger, and exporters write this."""


def same_before(node: ir.Node) -> ir.Node | None:
    """The node that made the first input, if it is of the same operator."""
    value = node.inputs[0]
    maker = value.producer() if value is not None else None
    return maker if maker is not None and is_onnx(maker, node.op_type) else None


def broadcasts_into(small: Sequence[int], large: ir.Shape | None) -> bool:
    """Broadcasting the one against the other gives `large`, whatever is unknown of it."""
    if not small:
        return True
    if large is None or len(small) > len(large):
        return False
    aligned = list(large)[len(large) - len(small) :]
    return all(s in (1, d) for s, d in zip(small, aligned, strict=True))


def _sizes(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The dimensions, None for each that is not known; None where not even the rank is."""
    shape = known_shape(value)
    return None if shape is None else tuple(d if isinstance(d, int) else None for d in shape)


def _inferred_sizes(node: ir.Node) -> tuple[int | None, ...] | None:
    """What was inferred for the output of a node whose shape is computed.

    Not what follows from a shape that callers can override.
    """
    overridable = any(v is not None and v.is_initializer() for v in node.inputs[1:])
    return None if overridable else _sizes(node.outputs[0])


def _always(node: ir.Node, opset: int) -> bool:
    return True


def _has_one_input(node: ir.Node, opset: int) -> bool:
    return len(node.inputs) == 1


def _has_one_output(node: ir.Node, opset: int) -> bool:
    return len(node.outputs) == 1


def _follows_the_same(node: ir.Node, opset: int) -> bool:
    """f(f(x)) = f(x)."""
    return same_before(node) is not None


def _dropout_is_off(node: ir.Node, opset: int) -> bool:
    return dropout_is_off(node)


def _casts_to_same(node: ir.Node, opset: int) -> bool:
    assert node.inputs[0] is not None
    return node.inputs[0].dtype is not None and node.inputs[0].dtype == _cast_type(node)


def _cast_type(node: ir.Node) -> ir.DataType | None:
    if is_onnx(node, "CastLike"):
        like = input_of(node, 1)
        return like.dtype if like is not None else None
    to = node.attributes.get_int("to")
    return ir.DataType(to) if to is not None else None


def _transposes_nothing(node: ir.Node, opset: int) -> bool:
    permutation = node.attributes.get_ints("perm")
    if permutation is not None:
        return tuple(permutation) == tuple(range(len(permutation)))
    sizes = _sizes(node.inputs[0])
    return sizes is not None and len(sizes) <= 1


def _reshapes_to_same(node: ir.Node, opset: int) -> bool:
    if _is_shape_of_first(node, 1):
        return True
    sizes = _sizes(node.inputs[0])
    if sizes is None:
        return False
    target = stated_integers(node, "shape", 1)
    if target is None:
        return _agree(sizes, _inferred_sizes(node))
    copies = node.attributes.get_int("allowzero", 0) == 0
    named = [t in (-1, s) or (t == 0 and copies) for t, s in zip(target, sizes, strict=False)]
    # All but the -1 agree, so it can only stand for what is there.
    return len(target) == len(sizes) and all(named) and target.count(-1) <= 1


def _agree(sizes: tuple[int | None, ...], others: tuple[int | None, ...] | None) -> bool:
    """Two shapes of the same number of elements are the same.

    They are when one dimension at most is unknown and all others are equal and not 0: the number
    of elements settles that one.
    """
    if others is None or len(sizes) != len(others):
        return False
    rest = [(s, o) for s, o in zip(sizes, others, strict=True) if (s, o) != (None, None)]
    if any(s != o for s, o in rest):
        return False
    return len(rest) == len(sizes) or (len(rest) == len(sizes) - 1 and (0, 0) not in rest)


def _is_shape_of_first(node: ir.Node, index: int) -> bool:
    """The input is Shape of the node's first input, all of it."""
    value = input_of(node, index)
    maker = value.producer() if value is not None else None
    if maker is None or not is_onnx(maker, "Shape") or maker.attributes:
        return False
    return maker.inputs[0] is node.inputs[0] and node.attributes.get_int("allowzero", 0) == 0


def _flattens_nothing(node: ir.Node, opset: int) -> bool:
    """[a, b] stays for axis 1; axes 0 and 2 give [1, a*b] and [a*b, 1]."""
    sizes = _sizes(node.inputs[0])
    if sizes is None or len(sizes) != 2:
        return False
    axis = node.attributes.get_int("axis", 1)
    axis += 2 if axis < 0 else 0
    return axis == 1 or (axis == 0 and sizes[0] == 1) or (axis == 2 and sizes[1] == 1)


def _squeezes_nothing(node: ir.Node, opset: int) -> bool:
    """Without axes, or with none in the list, all dimensions of size 1 go."""
    shape = static_shape(node.inputs[0])
    return stated_integers(node, "axes", 1) == () and shape is not None and 1 not in shape


def _unsqueezes_nothing(node: ir.Node, opset: int) -> bool:
    return stated_integers(node, "axes", 1) == ()


def _expands_nothing(node: ir.Node, opset: int) -> bool:
    if _is_shape_of_first(node, 1):
        return True
    target = stated_integers(node, "shape", 1)
    if target is not None:
        return broadcasts_into(target, known_shape(node.inputs[0]))
    shape = static_shape(node.inputs[0])
    return shape is not None and shape == _inferred_sizes(node)


def _repeats_once(node: ir.Node, opset: int) -> bool:
    repeats = stated_integers(node, "repeats", 1)
    return repeats is not None and all(r == 1 for r in repeats)


def _pads_nothing(node: ir.Node, opset: int) -> bool:
    pads = stated_integers(node, "pads", 1)
    return pads is not None and not any(pads)


def _slices_all(node: ir.Node, opset: int) -> bool:
    starts, ends = stated_integers(node, "starts", 1), stated_integers(node, "ends", 2)
    axes, steps = stated_integers(node, "axes", 3), stated_integers(node, "steps", 4)
    if not starts or ends is None or axes is None or steps is None:
        return False
    axes = axes or tuple(range(len(starts)))
    if any(s != 1 for s in steps) or not len(starts) == len(ends) == len(axes):
        return False
    sizes = _sizes(node.inputs[0])
    return all(_is_whole(sizes, *part) for part in zip(axes, starts, ends, strict=True))


def _is_whole(sizes: tuple[int | None, ...] | None, axis: int, start: int, end: int) -> bool:
    if sizes is None:
        return start == 0 and end >= WHOLE
    if not -len(sizes) <= axis < len(sizes):
        return False
    size = sizes[axis]
    if size is None:
        return start == 0 and end >= WHOLE
    return (start == 0 or start <= -size) and end >= size


def _resizes_nothing(node: ir.Node, opset: int) -> bool:
    """Scales of 1 put every point on itself, unless the window is cropped or shifted by half."""
    attributes = node.attributes
    if attributes.get_string("mode", "nearest") not in ("nearest", "linear"):
        return False
    if attributes.get_int("antialias", 0) != 0:
        return False
    points = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if points in ("tf_crop_and_resize", "tf_half_pixel_for_nn"):
        return False
    scales = input_of(node, 1 if opset < 11 else 2)
    factors = small_array(scales)
    if factors is not None and factors.size:
        return bool((factors == 1).all())
    # No scales are an empty tensor in opset 11, and no input later.
    return (scales is None or factors is not None) and _has_these_sizes(node)


def _has_these_sizes(node: ir.Node) -> bool:
    """The first input has the sizes that the node asks for."""
    wanted, known = stated_integers(node, "sizes", 3), _sizes(node.inputs[0])
    if not wanted or known is None:
        return False
    axes = node.attributes.get_ints("axes", range(len(known)))
    if len(axes) != len(wanted) or any(not -len(known) <= a < len(known) for a in axes):
        return False
    return all(known[a] == w for a, w in zip(axes, wanted, strict=True))


def _clips_nothing(node: ir.Node, opset: int) -> bool:
    """Only bounds that no number passes. Without bounds, infinity becomes the largest number."""
    assert node.inputs[0] is not None
    dtype = node.inputs[0].dtype
    if opset < 11 or dtype is None:
        return False
    limits = np.iinfo(dtype.numpy()) if dtype.numpy().kind in "iu" else None
    if limits is None:
        return _is_bound(input_of(node, 1), -np.inf) and _is_bound(input_of(node, 2), np.inf)
    return all(
        input_of(node, index) is None or _is_bound(input_of(node, index), bound)
        for index, bound in ((1, limits.min), (2, limits.max))
    )


def _is_bound(value: ir.Value | None, bound: float) -> bool:
    array = small_array(value, 1)
    return array is not None and array.size == 1 and bool(array.reshape(()) == bound)


UNCHANGED: dict[str, Callable[[ir.Node, int], bool]] = {
    "Abs": _follows_the_same,
    "Cast": _casts_to_same,
    "CastLike": _casts_to_same,
    "Ceil": _follows_the_same,
    "Clip": _clips_nothing,
    "Concat": _has_one_input,
    "Dropout": _dropout_is_off,
    "Expand": _expands_nothing,
    "Flatten": _flattens_nothing,
    "Floor": _follows_the_same,
    "Identity": _always,
    "Max": _has_one_input,
    "Mean": _has_one_input,
    "Min": _has_one_input,
    "Pad": _pads_nothing,
    "Relu": _follows_the_same,
    "Reshape": _reshapes_to_same,
    "Resize": _resizes_nothing,
    "Round": _follows_the_same,
    "Sign": _follows_the_same,
    "Slice": _slices_all,
    "Split": _has_one_output,
    "Squeeze": _squeezes_nothing,
    "Sum": _has_one_input,
    "Tile": _repeats_once,
    "Transpose": _transposes_nothing,
    "Unsqueeze": _unsqueezes_nothing,
}
"""Whether the first output is the first input, by operator."""
