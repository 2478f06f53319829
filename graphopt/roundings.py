"""Activations that a graph rounds to codes and back, and the same graph without the rounding.

A QuantizeLinear and the DequantizeLinear behind it are a step function. Where a value lies between
two steps, the last bit of it decides for one or the other, so that two models that are equal in
real arithmetic may differ by a step. Without rounding they are smooth, and can be compared as
others are: what is left of a rounding is then its range, as a Clip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.content import read_array
from graphopt.operators import is_onnx
from graphopt.rewriting import (
    Names,
    add_initializer,
    constant_tensor,
    input_of,
    only_reader,
    remove_node,
    replace_value,
)

CLIP_OPSET = 11
"""From which on a Clip takes its limits as inputs; QuantizeLinear is there one before."""


@dataclass(frozen=True)
class CodeMap:
    """What codes stand for: number = scale * (code - zero_point).

    Attributes:
        scale: float32.
        zero_point: a code.
        dtype: of codes, int8 or uint8.
    """

    scale: float
    zero_point: int
    dtype: ir.DataType

    @property
    def range(self) -> tuple[np.float32, np.float32]:
        """The numbers of the lowest and the highest code."""
        codes = np.iinfo(self.dtype.numpy())
        low, high = codes.min - self.zero_point, codes.max - self.zero_point
        return np.float32(low) * np.float32(self.scale), np.float32(high) * np.float32(self.scale)


@dataclass(frozen=True, eq=False)
class Rounding:
    """A float32 activation that becomes codes and floats again, for nothing but the rounding.

    Attributes:
        quantize: the QuantizeLinear.
        dequantize: the DequantizeLinear, which alone reads the codes.
        map: of both.
    """

    quantize: ir.Node
    dequantize: ir.Node
    map: CodeMap

    @property
    def source(self) -> ir.Value:
        """The value before."""
        value = self.quantize.inputs[0]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """The value after."""
        return self.dequantize.outputs[0]


def rounding_at(node: ir.Node) -> Rounding | None:
    """The rounding that begins with a node; None where none does."""
    if not is_onnx(node, "QuantizeLinear") or constant_tensor(node.inputs[0]) is not None:
        return None
    reader = only_reader(node.outputs[0])
    if reader is None or not is_onnx(reader, "DequantizeLinear") or reader.graph is not node.graph:
        return None
    here, there = map_of(node), map_of(reader)
    return None if here is None or here != there else Rounding(node, reader, here)


def map_of(node: ir.Node) -> CodeMap | None:
    """The map of a QuantizeLinear or DequantizeLinear, if it is one of 8 bits, and constant."""
    scale, zero_point = constant_tensor(node.inputs[1]), input_of(node, 2)
    if scale is None or scale.size != 1 or scale.dtype != ir.DataType.FLOAT:
        return None
    stated = node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8
    number, dtype = 0, ir.DataType(stated)
    if zero_point is not None:
        tensor = constant_tensor(zero_point)
        if tensor is None or tensor.size != 1:
            return None
        number, dtype = int(read_array(tensor).reshape(())), tensor.dtype
    if dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return None
    return CodeMap(float(read_array(scale).reshape(())), number, dtype)


def roundings_of(model: ir.Model) -> Iterator[Rounding]:
    """The roundings of the main graph, in order."""
    return (found for node in model.graph if (found := rounding_at(node)) is not None)


def maps_in(model: ir.Model) -> Counter[CodeMap]:
    """How many values are rounded by each map."""
    return Counter(rounding.map for rounding in roundings_of(model))


def without_rounding(model: ir.Model) -> ir.Model:
    """A clone in which activations are clipped to the ranges of their codes, and not rounded."""
    smooth = model.clone()
    names = Names(smooth)
    for rounding in list(roundings_of(smooth)):
        limits = [
            add_initializer(smooth.graph, np.asarray(limit), names.new("limit"))
            for limit in rounding.map.range
        ]
        clip = ir.node("Clip", [rounding.source, *limits], name=names.new("Clip"))
        clip.outputs[0].name = names.new("clipped")
        clip.outputs[0].type, clip.outputs[0].shape = rounding.output.type, rounding.output.shape
        smooth.graph.insert_after(rounding.quantize, clip)
        replace_value(rounding.output, clip.outputs[0])
        remove_node(rounding.dequantize)
        remove_node(rounding.quantize)
    return smooth


def why_other_maps(before: ir.Model, after: ir.Model) -> str | None:
    """Which map is not in both models, or rounds more values than before; None where none is.

    Values that are the same may have become one.
    """
    old, new = maps_in(before), maps_in(after)
    for one in old.keys() | new.keys():
        if not 1 <= new[one] <= old[one]:
            return (
                f"{new[one]} values are rounded with scale {one.scale:.9g} and zero point "
                f"{one.zero_point}; before, {old[one]} were"
            )
    return None
