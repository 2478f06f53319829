"""fuse-transpose: let a Conv read an image whose channels lie last as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx
from graphopt.rewriting import Names, constant_tensor, only_reader
from graphopt_passes.fuse.misfit import Misfit

CHANNELS_MAXIMUM = 15
"""More gain nothing in general, and make a Conv on codes slower.

On 40 x 40 places, 3 x 3 to 32 channels: 127 us become 111 from 8 channels, 134 become 133 from 16,
and 242 become 241 from 32.
"""


@dataclass(frozen=True)
class FuseTranspose(Pass):
    """Replace a Transpose from channels-last before a Conv by a Reshape, which copies nothing.

    An image [N, H, W, C] is, in the same memory, one [N, 1, H, W C] of a single channel. A window
    of kw columns, moved by s, is there one of kw C columns, moved by s C, so that the Conv needs
    its weight [O, C, kh, kw] as [O, 1, kh, kw C] and the pads of the last axis times C. Models
    exported from TensorFlow begin so.
    """

    name: ClassVar[str] = "fuse-transpose"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Transpose"})

    def refuse(self, model: ir.Model, context: Context) -> str | None:
        """Other kernels than those of the CPU prefer channels."""
        return None if context.provider == "cpu" else "it serves onnxruntime's CPU provider only"

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Rewrite every such pair of nodes."""
        change, names = Change(), Names(model)
        for node in context.index_of(model).of("Transpose"):
            conv = only_reader(node.outputs[0])
            if conv is None or not is_onnx(conv, "Conv") or conv.inputs[0] is not node.outputs[0]:
                continue
            try:
                _fuse(node, conv, names, context)
            except Misfit as reason:
                change.skip(node, str(reason))
            else:
                change.count("Transpose fused into Conv")
        return change


def _fuse(transpose: ir.Node, conv: ir.Node, names: Names, context: Context) -> None:
    graph, image, weight = conv.graph, transpose.inputs[0], conv.inputs[1]
    assert isinstance(graph, ir.Graph) and image is not None and weight is not None
    if transpose.graph is not graph:
        raise Misfit("the Conv is in a subgraph")
    tensor = constant_tensor(weight)
    if tensor is None:
        raise Misfit("the weight of the Conv is not constant")
    target, channels = _flat_shape(transpose, image)
    attributes = _flat_attributes(conv, list(tensor.shape.numpy()[2:]), channels)
    name = names.new(f"{image.name}_shape")
    shape = context.initializer(graph, np.array(target, np.int64), name)
    flat = ir.Value(name=names.new(f"{image.name}_flat"), type=image.type)
    name = names.new(f"Reshape_{image.name}")
    graph.insert_before(conv, ir.Node("", "Reshape", [image, shape], outputs=[flat], name=name))
    conv.replace_input_with(0, flat)
    name = names.new(f"{weight.name}_flat")
    conv.replace_input_with(1, context.initializer(graph, _flat_weight(read_array(tensor)), name))
    conv.attributes.update(attributes)
    graph.remove(transpose, safe=True)


def _flat_weight(weight: np.ndarray) -> np.ndarray:
    """[O, C, ..., k] as [O, 1, ..., k C]."""
    last = np.ascontiguousarray(np.moveaxis(weight, 1, -1))
    return last.reshape(len(last), 1, *last.shape[1:-2], -1)


def _flat_shape(transpose: ir.Node, image: ir.Value) -> tuple[list[int], int]:
    """The shape for Reshape, and how many channels the image has."""
    perm = transpose.attributes.get("perm")
    axes = [] if perm is None else list(perm.as_ints())
    if len(axes) < 3 or axes != [0, len(axes) - 1, *range(1, len(axes) - 1)]:
        raise Misfit("it does not move the channels from the last place to the second")
    dims = () if image.shape is None else image.shape.dims
    sizes = [d if isinstance(d, int) else -1 for d in dims[1:]]
    if len(dims) != len(axes) or -1 in sizes[-2:] or sizes.count(-1) > 1:
        raise Misfit("the size of the image is not known")
    *rows, width, channels = sizes
    if channels > CHANNELS_MAXIMUM:
        raise Misfit(f"it has over {CHANNELS_MAXIMUM} channels")
    return [0, 1, *rows, width * channels], channels


def _flat_attributes(conv: ir.Node, kernel: list[int], channels: int) -> dict[str, ir.Attr]:
    """Kernel, strides and pads of the same Conv with the channels in the last axis."""
    stated, axes = conv.attributes, len(kernel)
    if stated.get_int("group", 1) != 1:
        raise Misfit("the Conv has groups")
    auto_pad = stated.get_string("auto_pad", "NOTSET")
    if auto_pad not in ("NOTSET", "VALID"):
        raise Misfit(f"the Conv chooses its pads by the size of its input ({auto_pad})")
    if stated.get_ints("dilations", (1,) * axes)[-1] != 1:
        raise Misfit("the Conv is dilated")
    strides = list(stated.get_ints("strides", (1,) * axes))
    pads = list(stated.get_ints("pads", ())) or [0] * 2 * axes
    if auto_pad == "NOTSET":
        pads[axes - 1] *= channels
        pads[-1] *= channels
    sizes = {
        "kernel_shape": [*kernel[:-1], kernel[-1] * channels],
        "strides": [*strides[:-1], strides[-1] * channels],
        **({"pads": pads} if auto_pad == "NOTSET" else {}),
    }
    return {name: ir.AttrInt64s(name, values) for name, values in sizes.items()}
