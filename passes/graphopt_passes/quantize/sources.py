"""What makes channels by constants that can be divided: normalizations, scales, products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.operators import is_onnx
from graphopt.rewriting import constant_tensor, input_of
from graphopt_passes.quantize.flows import PRODUCTS, Blocked, Channels, Offset, Order
from graphopt_passes.quantize.rescaling import Source, product_source
from graphopt_passes.simplify.chains import axis_attribute, rank_of, sizes_of

NORMALIZATIONS: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
}
"""Which inputs scale and shift the channels of the last axis, by operator.

Those of onnxruntime's own domain are left out: ONNX infers no shapes after them.
"""


def products_of(order: Order) -> Iterator[Source]:
    """The products of a graph whose rows can be divided."""
    for node in order.nodes:
        if is_onnx(node, *PRODUCTS):
            try:
                yield product_source(node)
            except Blocked:
                continue


def scales_of(order: Order) -> Iterator[Source]:
    """Normalizations, and multiplications by a constant with a number for each channel."""
    for node in order.nodes:
        source = None
        if is_onnx(node, *NORMALIZATIONS):
            source = _normalization(node, NORMALIZATIONS[node.op_type])
        elif is_onnx(node, "Mul"):
            source = _multiplication(node)
        if source is not None:
            yield source


def _normalization(node: ir.Node, places: tuple[int, ...]) -> Source | None:
    """A normalization over the last axis with constant scale, and constant shift or none."""
    present = [place for place in places if input_of(node, place) is not None]
    tensors = [constant_tensor(node.inputs[place]) for place in present]
    shapes = {None if t is None else tuple(t.shape.numpy()) for t in tensors}
    rank = rank_of(node.outputs[0])
    if len(shapes) != 1 or rank is None or axis_attribute(node, rank, -1) != rank - 1:
        return None
    (shape,) = shapes
    if shape is None or len(shape) != 1 or not _all_float(tensors):
        return None
    return _source(node, present, rank - 1, rank, shape[0])


def _multiplication(node: ir.Node) -> Source | None:
    """Mul by a constant with one number for each channel along one axis."""
    sizes = sizes_of(node.outputs[0])
    places = [place for place, v in enumerate(node.inputs) if constant_tensor(v) is not None]
    if sizes is None or len(places) != 1 or rank_of(node.inputs[1 - places[0]]) != len(sizes):
        return None
    tensor = constant_tensor(node.inputs[places[0]])
    assert tensor is not None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    axes = [axis for axis, d in enumerate(shape) if d != 1]
    if len(axes) != 1 or len(shape) > len(sizes) or not _all_float([tensor]):
        return None
    axis = len(sizes) - len(shape) + axes[0]
    if sizes[axis] != shape[axes[0]] or sizes_of(node.inputs[1 - places[0]])[axis] == 1:  # type: ignore[index]
        return None
    return _source(node, places, axis, len(sizes), shape[axes[0]])


def _all_float(tensors: list[ir.TensorProtocol | None]) -> bool:
    return all(t is not None and t.dtype == ir.DataType.FLOAT for t in tensors)


def _source(node: ir.Node, places: list[int], axis: int, rank: int, count: int) -> Source:
    channels = Channels(axis, np.arange(count))
    constants = tuple(Offset(node, place, channels, rank) for place in places)
    return Source(node, node.outputs[0], channels, constants=constants)
