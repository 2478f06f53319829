"""The rules of operators that move elements; see `graphopt.group_rules`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.contract import describe
from graphopt.couplings import End, Site, broadcast_to
from graphopt.operators import is_onnx
from graphopt.packing import is_constant
from graphopt.reshape_blocks import Block, cut, factors_of
from graphopt.rewriting import constant_tensor, input_of, small_integers, stated_integers

RESIZE_HAS_REGIONS = 11
"""From this opset on, the regions of interest are an input before the scales."""

HAS_WHERE = 9
"""From this opset on there is a Where."""


def _ends(site: Site) -> tuple[End, End] | None:
    """The first input and the first output."""
    source, target = site.input(0), site.output()
    return None if source is None or target is None else (source, target)


def _transpose(site: Site) -> None:
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    order = site.node.attributes.get_ints("perm", tuple(reversed(range(source.rank))))
    for axis, place in enumerate(order):
        site.tie(source, place, target, axis)


def _squeeze(site: Site) -> None:
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    axes = stated_integers(site.node, "axes", 1)
    if axes is None:
        return
    gone = {axis % source.rank for axis in axes} or {
        a for a, s in enumerate(source.sizes) if s == 1
    }
    kept = [axis for axis in range(source.rank) if axis not in gone]
    if len(kept) == target.rank:
        for place, axis in enumerate(kept):
            site.tie(source, axis, target, place)


def _unsqueeze(site: Site) -> None:
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    axes = stated_integers(site.node, "axes", 1)
    if axes is None:
        return
    new = {axis % target.rank for axis in axes}
    for place, axis in enumerate(axis for axis in range(target.rank) if axis not in new):
        site.tie(source, place, target, axis)


def _concat(site: Site) -> None:
    target = site.output()
    if target is None or not target.rank:
        return
    along = site.node.attributes.get_int("axis", 1) % target.rank
    start: int | None = 0
    for source in site.inputs():
        for axis in range(target.rank):
            if axis != along:
                site.tie(source, axis, target, axis)
        size = source.size(along)
        if start is not None and size is not None and target.size(along) is not None:
            site.tie(source, along, target, along, np.arange(size), np.arange(start, start + size))
            start += size
        else:
            start = None
            site.freeze(source, along, "it is not known where it comes to lie")
            site.freeze(target, along, "it is not known what lies where")


def split_sizes(node: ir.Node, size: int) -> list[int] | None:
    """The sizes of the parts that a Split makes of an axis; None where they are computed."""
    stated = stated_integers(node, "split", 1)
    if stated is None:
        return None
    if stated:
        return list(stated)
    # Equal parts, the last of which may be smaller.
    count = len(node.outputs)
    part = -(-size // count)
    return [part] * (count - 1) + [size - part * (count - 1)]


def _split(site: Site) -> None:
    source = site.input(0)
    if source is None or not source.rank:
        return
    along = site.node.attributes.get_int("axis", 0) % source.rank
    size = source.size(along)
    sizes = split_sizes(site.node, size) if size is not None else None
    if sizes is None or len(sizes) != len(site.node.outputs) or sum(sizes) != size:
        sizes = None
    start = 0
    for index in range(len(site.node.outputs)):
        target = site.output(index)
        part = sizes[index] if sizes is not None else 0
        if target is None:
            if sizes is not None:
                unread = np.arange(start, start + part)
                site.freeze_positions(source, along, unread, "leaves this part unread")
            start += part
            continue
        for axis in range(source.rank):
            if axis != along:
                site.tie(source, axis, target, axis)
        if sizes is not None:
            site.tie(source, along, target, along, np.arange(start, start + part), np.arange(part))
        start += part


def sliced_axes(node: ir.Node, rank: int) -> dict[int, slice] | None:
    """The slice that a Slice takes of each axis that it names; None where bounds are computed."""
    starts = stated_integers(node, "starts", 1)
    ends = stated_integers(node, "ends", 2)
    axes = stated_integers(node, "axes", 3)
    steps = stated_integers(node, "steps", 4)
    if starts is None or ends is None or axes is None or steps is None:
        return None
    axes = axes or tuple(range(len(starts)))
    steps = steps or (1,) * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    return {
        # ONNX's bounds are Python's.
        axis % rank: slice(start, end, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }


def _slice(site: Site) -> None:
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    slices = sliced_axes(site.node, source.rank)
    if slices is None:
        return
    for axis in range(source.rank):
        if axis not in slices:
            site.tie(source, axis, target, axis)
            continue
        size = source.size(axis)
        if size is None:
            continue
        picked = np.arange(size)[slices[axis]]
        if picked.size != target.size(axis):
            continue
        site.passes(source, axis)
        if picked.size == size and (picked == np.arange(size)).all():
            site.tie(source, axis, target, axis)
        elif picked.size:
            site.tie(source, axis, target, axis, picked, np.arange(picked.size))


def gathered(node: ir.Node, size: int) -> np.ndarray | None:
    """int64 [] or [n]: the indices that a Gather takes, if they are constant; none negative."""
    tensor = constant_tensor(input_of(node, 1))
    if tensor is None or len(tensor.shape) > 1:
        return None
    index = tensor.numpy().astype(np.int64)
    return np.where(index < 0, index + size, index)


def _gather(site: Site) -> None:
    source, indices, target = site.input(0), site.input(1), site.output()
    if source is None or indices is None or target is None or not source.rank:
        return
    along = site.node.attributes.get_int("axis", 0) % source.rank
    for axis in range(source.rank):
        if axis < along:
            site.tie(source, axis, target, axis)
        elif axis > along:
            site.tie(source, axis, target, axis + indices.rank - 1)
            if is_constant(source.value):
                site.makes(source, axis)
    size = source.size(along)
    index = gathered(site.node, size) if size is not None else None
    if index is None:
        site.freeze(source, along, "looks up along it")
        for axis in range(indices.rank):
            site.tie(indices, axis, target, along + axis)
    elif index.ndim:
        # Each Gather gets indices of its own where some are removed.
        site.passes(indices, 0)
        site.tie(source, along, target, along, index, np.arange(index.size))
    else:
        site.freeze_positions(source, along, index.reshape(1), "takes this one")


def padded_axes(node: ir.Node, rank: int) -> dict[int, tuple[int, int]] | None:
    """What a Pad adds before and after each axis that it names; None where that is computed."""
    pads = stated_integers(node, "pads", 1)
    axes = stated_integers(node, "axes", 3)
    if pads is None or axes is None:
        return None
    axes = axes or tuple(range(rank))
    if len(pads) != 2 * len(axes):
        return None
    count = len(axes)
    return {axis % rank: (pads[i], pads[count + i]) for i, axis in enumerate(axes)}


def _pad(site: Site) -> None:
    """Channels that are padded are channels that hold one number."""
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    pads = padded_axes(site.node, source.rank)
    if pads is None:
        return
    is_constant_mode = site.node.attributes.get_string("mode", "constant") == "constant"
    for axis in range(source.rank):
        before, after = pads.get(axis, (0, 0))
        size = source.size(axis)
        if before == after == 0:
            site.tie(source, axis, target, axis)
        elif is_constant_mode and min(before, after) >= 0 and size is not None:
            site.tie(source, axis, target, axis, np.arange(size), before + np.arange(size))


def _expand(site: Site) -> None:
    """What it repeats may be repeated less often."""
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    if not _can_be_restated(site):
        return
    for axis in range(target.rank):
        site.passes(target, axis)
    broadcast_to(site, source, target)


def _tile(site: Site) -> None:
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    repeats = small_integers(input_of(site.node, 1))
    if repeats is None or len(repeats) != source.rank:
        return
    for axis, times in enumerate(repeats):
        size = source.size(axis)
        if times == 1:
            site.tie(source, axis, target, axis)
        elif size is not None and size > 1 and times > 1:
            index = np.arange(size * times)
            site.tie(source, axis, target, axis, index % size, index)


def _can_be_restated(site: Site) -> bool:
    """The shape that is asked for is constant, or a Where can put other sizes into it."""
    shape = site.input(1)
    if shape is None or shape.rank != 1 or shape.size(0) is None:
        return False
    return is_constant(shape.value) or site.opset >= HAS_WHERE


def _flatten(site: Site) -> None:
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    axis = site.node.attributes.get_int("axis", 1)
    axis += source.rank if axis < 0 else 0
    # Both halves by themselves: the sizes of one may be unknown.
    for axes, place in ((range(axis), 0), (range(axis, source.rank), 1)):
        sizes = [source.sizes[a] for a in axes]
        for block in cut(sizes, [target.sizes[place]]):
            _tie_block(site, source, [axes[i] for i in block[0]], target, [place])


def _reshape(site: Site) -> None:
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    if not _can_be_restated(site):
        return
    for block in cut(source.sizes, target.sizes):
        _tie_block(site, source, block[0], target, block[1])


def _tie_block(
    site: Site, source: End, axes: Sequence[int], target: End, places: Sequence[int]
) -> None:
    if len(axes) == len(places) == 1:
        site.tie(source, axes[0], target, places[0])
        return
    number = site.couplings.axis_number
    inputs = tuple(number(source.value, axis) for axis in axes)
    outputs = tuple(number(target.value, place) for place in places)
    sizes, others = [source.size(a) for a in axes], [target.size(p) for p in places]
    if None in sizes or None in others:
        return
    factors = factors_of(inputs, sizes, outputs, others)  # type: ignore[arg-type]
    name = f"{site.node.op_type} {describe(site.node)}"
    site.reshape(Block(name, inputs, outputs, factors), source, target)


def _resize(site: Site) -> None:
    """Axes that keep their size keep their elements."""
    if (ends := _ends(site)) is None:
        return
    source, target = ends
    attributes = site.node.attributes
    mode = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_crop_and_resize" or "axes" in attributes:
        return
    scales, sizes = _scales(site), None
    if is_onnx(site.node, "Resize"):
        sizes = site.couplings.facts.content(input_of(site.node, 3))
    for axis in range(source.rank):
        is_scaled_by_1 = scales is not None and len(scales) == source.rank and scales[axis] == 1
        keeps = (
            sizes is not None and len(sizes) == source.rank and sizes[axis] == source.sizes[axis]
        )
        if is_scaled_by_1 or keeps:
            site.tie(source, axis, target, axis)


def _scales(site: Site) -> np.ndarray | None:
    """By what a Resize or Upsample scales each axis; None where that is computed or not stated."""
    node = site.node
    if "scales" in node.attributes:
        return np.asarray(node.attributes["scales"].as_floats())
    after_regions = is_onnx(node, "Resize") and site.opset >= RESIZE_HAS_REGIONS
    scales = constant_tensor(input_of(node, 2 if after_regions else 1))
    return scales.numpy() if scales is not None and scales.size else None


def _shape(site: Site) -> None:
    """Only the sizes that are read have to stay."""
    source, target = site.input(0), site.output()
    if source is None or target is None:
        return
    read = _read_places(site.node, source.rank)
    for axis in range(source.rank):
        if axis in read:
            site.freeze(source, axis, "its size is read")
        else:
            site.passes(source, axis)


def _read_places(node: ir.Node, rank: int) -> set[int]:
    """The axes of which a Shape is asked for the size."""
    axes = np.arange(rank)
    start = node.attributes.get_int("start", 0)
    axes = axes[start : node.attributes.get_int("end", rank)]
    output = node.outputs[0]
    read: set[int] = set(axes.tolist()) if output.is_graph_output() else set()
    for use in output.uses():
        index: np.ndarray | None = None
        if is_onnx(use.node, "Gather") and use.idx == 0:
            index = gathered(use.node, axes.size)
        elif is_onnx(use.node, "Slice") and use.idx == 0:
            slices = sliced_axes(use.node, 1)
            index = np.arange(axes.size)[slices[0]] if slices is not None else None
        read |= set((axes if index is None else axes[index].reshape(-1)).tolist())
    return read


def _nothing(site: Site) -> None:
    """What is made here may become smaller: a Constant."""
    for end in site.ends.values():
        for axis in range(end.rank):
            site.passes(end, axis)


def _top_k(site: Site) -> None:
    source = site.input(0)
    if source is None or not source.rank:
        return
    along = site.node.attributes.get_int("axis", -1) % source.rank
    for index in (0, 1):
        target = site.output(index)
        for axis in range(source.rank) if target is not None else ():
            if axis != along:
                site.tie(source, axis, target, axis)  # type: ignore[arg-type]


MOVEMENTS: dict[str, Callable[[Site], None]] = {
    "Concat": _concat,
    "Constant": _nothing,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "TopK": _top_k,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}
"""By operator of the standard domain."""
