"""Where the channels that a node makes lie in what follows, up to the products that read them.

If every channel i of a value is divided by a positive number s[i], then what follows is divided too
wherever it is positively homogeneous, f(x / s) = f(x) / s, and keeps channels apart: Relu, pooling,
Concat, Gather of channels, a product with another value. A product with a weight takes the numbers
back, by its columns: W·x = (W * s)·(x / s).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt.contract import describe
from graphopt.operators import is_onnx
from graphopt.packing import is_packed
from graphopt.rewriting import constant_tensor, input_of, small_array, small_integers
from graphopt_passes.quantize.layers import Layer, layer_of
from graphopt_passes.simplify.chains import (
    axis_attribute,
    bounds_of,
    rank_of,
    size_at,
    sizes_of,
    split_sizes,
)

PRODUCTS = ("Conv", "Gemm", "MatMul")

FIRST_OPSET = 11
"""From it on, Clip and Pad take their numbers as inputs."""

ELSEWHERE = -1
"""Origin of a channel that another node made."""


class Blocked(Exception):
    """Why the channels of a value must stay as they are."""


@dataclass(frozen=True, eq=False)
class Channels:
    """What lies along one axis of a value.

    Attributes:
        axis: counted from the front.
        origin: for each place along the axis the channel that lies there, or `ELSEWHERE`; int64.
    """

    axis: int
    origin: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """Where channels that are followed lie; bool, of the shape of `origin`."""
        return self.origin >= 0

    def spread(self, factors: np.ndarray) -> np.ndarray:
        """Numbers for each channel that is followed, for each place; 1 elsewhere."""
        return np.where(self.own, factors[self.origin], 1.0)


@dataclass(frozen=True, eq=False)
class Sink:
    """A product that reads channels.

    Attributes:
        layer: the product.
        channels: of its input.
    """

    layer: Layer
    channels: Channels


@dataclass(frozen=True, eq=False)
class Offset:
    """A constant that is added to channels, or multiplied with what makes them.

    Attributes:
        node: reads it.
        index: the input of the node.
        channels: of the value that the node makes.
        rank: of that value.
    """

    node: ir.Node
    index: int
    channels: Channels
    rank: int

    def aligned(self, factors: np.ndarray) -> np.ndarray:
        """Numbers for each channel, so that they broadcast against the constant."""
        spread = self.channels.spread(factors)
        return spread.reshape(-1, *(1,) * (self.rank - 1 - self.channels.axis))


@dataclass(frozen=True, eq=False)
class Stop:
    """A value on the way that is rounded to codes of its own: what reads it has a kernel for codes.

    Attributes:
        value: on the way.
        channels: of the value.
    """

    value: ir.Value
    channels: Channels


@dataclass
class Flow:
    """All that the channels of a value reach.

    Attributes:
        sinks: the products at the end.
        offsets: constants that must be divided with the channels.
        stops: values on the way that are rounded for themselves.
        multiplied: another value is multiplied with the channels on the way.
    """

    sinks: list[Sink] = field(default_factory=list)
    offsets: list[Offset] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    multiplied: bool = False


class Order:
    """The nodes of a graph by their place in it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        self._places = {node: place for place, node in enumerate(self.nodes)}

    def of(self, node: ir.Node) -> int:
        """The place of a node of the graph.

        Raises:
            Blocked: it is in a body of If, Loop or Scan.
        """
        if node not in self._places:
            raise Blocked("a body of If, Loop or Scan reads it")
        return self._places[node]


Found = Mapping[ir.Value, Channels]


def flow_of(value: ir.Value, channels: Channels, order: Order) -> Flow:
    """Follow channels to the products that read them.

    Args:
        value: what the channels are of.
        channels: of the value.
        order: of its graph.

    Raises:
        Blocked: something else depends on the channels, or nothing does.
    """
    flow = Flow()
    found: dict[ir.Value, Channels] = {}
    waiting: list[int] = []
    reached = {value: channels}
    while True:
        for made, layout in reached.items():
            if layout.own.any():
                found[made] = layout
                waiting += _readers(made, order)
        if not waiting:
            break
        heapq.heapify(waiting)
        place = heapq.heappop(waiting)
        waiting = [other for other in waiting if other != place]
        reached = _through(order.nodes[place], found, flow)
    if not flow.sinks:
        raise Blocked("no product with a weight reads it")
    return flow


def _readers(value: ir.Value, order: Order) -> list[int]:
    if value.is_graph_output():
        raise Blocked(f"{value.name} is an output of the graph")
    return [order.of(use.node) for use in value.uses()]


def _through(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    """What a node makes of channels; takes down what must be scaled on the way."""
    if is_onnx(node, *PRODUCTS):
        flow.sinks.append(_sink(node, found))
        return {}
    rule = RULES.get(node.op_type) if is_onnx(node, node.op_type) else None
    if rule is None:
        raise Blocked(f"{node.op_type} reads it")
    return rule(node, found, flow)


# ------------------------------------------------------------------ products


def why_fixed(node: ir.Node) -> str | None:
    """Why the weight and bias of a product cannot be scaled; None when they can."""
    weight, bias = input_of(node, 1), input_of(node, 2)
    if is_packed(weight):
        return "the weight is packed"
    tensor = constant_tensor(weight)
    if weight is None or tensor is None:
        return "the weight is not constant"
    if tensor.dtype != ir.DataType.FLOAT:
        return f"the weight is of type {tensor.dtype.name}"
    if len(weight.uses()) > 1 or weight.is_graph_output():
        return "the weight is shared"
    if is_onnx(node, "Conv"):
        group = node.attributes.get_int("group", 1)
        if len(tensor.shape) < 3 or group < 1 or int(tensor.shape.numpy()[0]) % group:
            return "the weight does not fit the groups"
    elif len(tensor.shape) != 2 or (
        is_onnx(node, "Gemm") and node.attributes.get_int("transA", 0) != 0
    ):
        return "it is no product of rows with a matrix"
    outputs = int(tensor.shape.numpy()[layer_of(node).axis])
    tensor = constant_tensor(bias)
    if bias is not None and (tensor is None or tensor.size not in (1, outputs)):
        return "the bias is not one constant for each output"
    return None


def _is_transposed(node: ir.Node) -> bool:
    return is_onnx(node, "Gemm") and node.attributes.get_int("transA", 0) != 0


def _sink(node: ir.Node, found: Found) -> Sink:
    channels = _only(node, found)
    reason = why_fixed(node)
    if reason is not None:
        raise Blocked(f"{describe(node)} reads it, and {reason}")
    rank = rank_of(node.inputs[0]) if is_onnx(node, "MatMul") else 2
    layer = layer_of(node)
    if rank is None or channels.axis != rank - 1 or channels.origin.size != inputs_of(layer):
        raise Blocked(f"{describe(node)} reads it along another axis")
    return Sink(layer, channels)


def inputs_of(layer: Layer) -> int:
    """How many input channels a product has."""
    tensor = constant_tensor(layer.weight)
    assert tensor is not None
    shape = tensor.shape.numpy()
    return (
        int(shape[1]) * layer.group if is_onnx(layer.node, "Conv") else int(shape[1 - layer.axis])
    )


# ------------------------------------------------------------------ what lies between


def _only(node: ir.Node, found: Found) -> Channels:
    """Of the first input, which alone has channels that are followed."""
    first, *others = node.inputs
    if first is None or first not in found or any(v in found for v in others if v is not None):
        raise Blocked(f"{node.op_type} reads it as more than data")
    return found[first]


def _to(value: ir.Value, axis: int, origin: np.ndarray) -> dict[ir.Value, Channels]:
    return {value: Channels(axis, origin)}


def _same(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    return {node.outputs[0]: _only(node, found)}


def _bent(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    _stop(node.inputs[0], _only(node, found), flow)
    return _same(node, found, flow)


def _stop(value: ir.Value | None, channels: Channels, flow: Flow) -> None:
    assert value is not None
    flow.stops.append(Stop(value, channels))


def _no_data(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    return {}


def _spatial(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    channels = _only(node, found)
    if channels.axis != 1 or len(node.outputs) != 1:
        raise Blocked(f"{node.op_type} mixes its channels")
    return {node.outputs[0]: channels}


def _prelu(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    if constant_tensor(node.inputs[1]) is None:
        raise Blocked("PRelu reads it with a slope that is not constant")
    return _bent(node, found, flow)


def _clip(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    """At 0 from below it is a Relu; any other limit is one number for all channels."""
    channels = _only(node, found)
    low, high = (input_of(node, index) for index in (1, 2))
    floor = small_array(low, 1)
    if high is not None or (low is not None and (floor is None or floor.any())):
        raise Blocked("Clip reads it, with a limit that all channels share")
    return {node.outputs[0]: channels}


def _pad(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    channels = _only(node, found)
    pads, value = small_integers(input_of(node, 1)), input_of(node, 2)
    mode = node.attributes.get_string("mode", "constant")
    number = small_array(value, 1)
    if mode == "constant" and value is not None and (number is None or number.any()):
        raise Blocked("Pad reads it, and fills with another number than 0")
    rank = rank_of(node.inputs[0])
    if pads is None or input_of(node, 3) is not None or rank is None or len(pads) != 2 * rank:
        raise Blocked("Pad reads it along unknown axes")
    if pads[channels.axis] or pads[channels.axis + rank]:
        raise Blocked("Pad adds channels to it")
    return {node.outputs[0]: channels}


def _resize(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    channels = _only(node, found)
    if size_at(node.outputs[0], channels.axis) != channels.origin.size:
        raise Blocked("Resize makes an unknown number of channels of it")
    if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Blocked("Resize reads it with a constant outside")
    return {node.outputs[0]: channels}


def _transpose(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    channels, rank = _only(node, found), rank_of(node.inputs[0])
    order = node.attributes.get_ints("perm", None)
    if rank is None and order is None:
        raise Blocked("Transpose reads it, of unknown rank")
    order = range(rank)[::-1] if order is None else order  # type: ignore[arg-type]
    return _to(node.outputs[0], list(order).index(channels.axis), channels.origin)


def _reshape(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    """Where the dimensions from the channels on are merged, or only others change.

    Rows of the same length as before, in the same order, hold the same elements.
    """
    channels = _only(node, found)
    before, after = sizes_of(node.inputs[0]), sizes_of(node.outputs[0])
    if before is None or after is None or None in before[channels.axis :]:
        raise Blocked(f"{node.op_type} reads it, of unknown shape")
    inner = math.prod(before[channels.axis + 1 :])  # type: ignore[arg-type]
    count = channels.origin.size
    for axis in range(len(after)):
        rest = after[axis:]
        if None in rest or math.prod(rest) != count * inner:  # type: ignore[arg-type]
            continue
        if rest[0] == count:
            return _to(node.outputs[0], axis, channels.origin)
        if rest[0] == count * inner:
            return _to(node.outputs[0], axis, np.repeat(channels.origin, inner))
    raise Blocked(f"{node.op_type} mixes its channels with other dimensions")


def _gather(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    channels = _only(node, found)
    axis = axis_attribute(node, rank_of(node.inputs[0]))
    indices = small_array(input_of(node, 1), 1 << 16)
    if axis != channels.axis or indices is None or indices.ndim != 1:
        raise Blocked("Gather reads it with indices that are not constant, or on another axis")
    return _to(node.outputs[0], axis, channels.origin[indices])


def _slice(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    channels, bounds = _only(node, found), bounds_of(node)
    if bounds is None:
        raise Blocked("Slice reads it within bounds that are not constant")
    start, end, step = bounds.get(channels.axis, (0, channels.origin.size, 1))
    return _to(node.outputs[0], channels.axis, channels.origin[start:end:step])


def _split(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    channels = _only(node, found)
    axis = axis_attribute(node, rank_of(node.inputs[0]))
    sizes = None if axis is None else split_sizes(node, axis)
    if axis is None or sizes is None:
        raise Blocked("Split reads it into unknown sizes")
    if axis != channels.axis:
        return dict.fromkeys(node.outputs, channels)
    parts = np.split(channels.origin, np.cumsum(sizes)[:-1])
    return {o: Channels(axis, p) for o, p in zip(node.outputs, parts, strict=True)}


def _concat(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    values = [v for v in node.inputs if v is not None]
    axis = axis_attribute(node, rank_of(node.outputs[0]))
    parts = []
    for value in values:
        size = None if axis is None else size_at(value, axis)
        channels = found.get(value)
        if size is None or (channels is not None and channels.axis != axis):
            raise Blocked("Concat joins it with others along another axis")
        parts.append(np.full(size, ELSEWHERE) if channels is None else channels.origin)
    assert axis is not None
    return _to(node.outputs[0], axis, np.concatenate(parts))


def _operand(node: ir.Node, found: Found) -> tuple[int, Channels]:
    """Which of two operands has the channels, which the result keeps."""
    places = [place for place, value in enumerate(node.inputs) if value in found]
    if len(places) != 1:
        raise Blocked(f"{node.op_type} reads it twice")
    value = node.inputs[places[0]]
    assert value is not None
    channels, rank = found[value], rank_of(value)
    if rank is None or rank_of(node.outputs[0]) != rank:
        raise Blocked(f"{node.op_type} reads it, of unknown rank")
    if size_at(node.outputs[0], channels.axis) != channels.origin.size:
        raise Blocked(f"{node.op_type} makes an unknown number of channels of it")
    return places[0], channels


def _multiplied(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    place, channels = _operand(node, found)
    if place == 1 and is_onnx(node, "Div"):
        raise Blocked("Div divides by it")
    flow.multiplied |= constant_tensor(node.inputs[1 - place]) is None
    _stop(node.inputs[place], channels, flow)
    return {node.outputs[0]: channels}


def _added(node: ir.Node, found: Found, flow: Flow) -> dict[ir.Value, Channels]:
    place, channels = _operand(node, found)
    constant, rank = node.inputs[1 - place], rank_of(node.outputs[0])
    tensor = constant_tensor(constant)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or rank is None:
        raise Blocked(f"{node.op_type} adds another value to it")
    flow.offsets.append(Offset(node, 1 - place, channels, rank))
    _stop(node.inputs[place], channels, flow)
    return {node.outputs[0]: channels}


Rule = Callable[[ir.Node, Found, Flow], dict[ir.Value, Channels]]

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Identity", "Relu"), _same),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"), _spatial),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Div", "Mul"), _multiplied),
    **dict.fromkeys(("Add", "Sub"), _added),
    **dict.fromkeys(("Shape", "Size"), _no_data),
    **dict.fromkeys(("Abs", "LeakyRelu", "Neg"), _bent),
    "Clip": _clip,
    "Concat": _concat,
    "Gather": _gather,
    "PRelu": _prelu,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
