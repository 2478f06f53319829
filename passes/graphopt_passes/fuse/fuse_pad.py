"""fuse-pad: let Conv and AveragePool pad, instead of a Pad before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt.contract import Change, Context, Effect, Pass
from graphopt.operators import is_onnx, opset_of
from graphopt.rewriting import constant_tensor, only_reader, small_array, small_integers
from graphopt_passes.fuse.misfit import Misfit


@dataclass(frozen=True)
class FusePad(Pass):
    """Add the zeros of a Pad to the pads of the Conv or AveragePool that reads it.

    For AveragePool, zeros from a Pad count in the mean. Its own pads count with
    `count_include_pad`, which is set where it has none yet. MaxPool stays: its own pads are
    minus infinity, not zero.
    """

    name: ClassVar[str] = "fuse-pad"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Pad"})

    def apply(self, model: ir.Model, context: Context) -> Change:
        """Merge pads, from the outputs backwards, so that of several Pads in a row all go."""
        change, opset = Change(), opset_of(model)
        for node in reversed(context.index_of(model).of("Pad")):
            _fuse(node, opset, change)
        return change


def _fuse(pad: ir.Node, opset: int, change: Change) -> None:
    readers = [use.node for use in pad.outputs[0].uses()]
    if not any(is_onnx(reader, "Conv", "AveragePool", "MaxPool") for reader in readers):
        return
    try:
        reader = _only_reader(pad)
        added = _added(pad, _rank(reader), opset)
        if not any(added):
            return
        pads = [a + b for a, b in zip(added, _own(reader, len(added)), strict=True)]
        if is_onnx(reader, "AveragePool"):
            _check_average(reader, pads, opset)
    except Misfit as reason:
        change.skip(pad, str(reason))
        return
    if is_onnx(reader, "AveragePool"):
        reader.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    reader.attributes.pop("auto_pad", None)
    reader.attributes["pads"] = ir.AttrInt64s("pads", pads)
    reader.replace_input_with(0, pad.inputs[0])
    assert isinstance(pad.graph, ir.Graph)
    pad.graph.remove(pad, safe=True)
    change.count(f"Pad fused into {reader.op_type}")


def _only_reader(pad: ir.Node) -> ir.Node:
    """The node that may take over the pads."""
    value = pad.outputs[0]
    reader = only_reader(value)
    if reader is None:
        raise Misfit("its output is read by other nodes, or an output of the graph")
    if reader.graph is not pad.graph:
        raise Misfit("its output is read in a subgraph")
    if reader.inputs[0] is not value:
        raise Misfit(f"its output is the weight or bias of {reader.op_type}")
    if is_onnx(reader, "MaxPool"):
        raise Misfit("MaxPool pads with minus infinity, not with zero")
    return reader


def _rank(reader: ir.Node) -> int:
    """The rank of the reader's input, by the reader's own weight or kernel."""
    if is_onnx(reader, "AveragePool"):
        return 2 + len(reader.attributes["kernel_shape"].as_ints())
    weight = reader.inputs[1]
    tensor = constant_tensor(weight)
    if tensor is not None:
        return len(tensor.shape)
    if weight is None or weight.shape is None:
        raise Misfit("the rank of the weight of Conv is not known")
    return len(weight.shape)


def _added(pad: ir.Node, rank: int, opset: int) -> list[int]:
    """How many zeros the Pad puts before the spatial axes, in order, and then after each."""
    mode = pad.attributes.get_string("mode", "constant")
    if mode != "constant":
        raise Misfit(f"its mode is {mode}")
    pads, axes = _pads_by_attribute(pad) if opset < 11 else _pads_by_input(pad)
    axes = list(range(rank)) if axes is None else [axis + rank * (axis < 0) for axis in axes]
    if len(pads) != 2 * len(axes) or len({*axes} & {*range(rank)}) != len(axes):
        raise Misfit(f"its pads and axes are not those of {rank} dimensions")
    if any(amount < 0 for amount in pads):
        raise Misfit("it has negative pads")
    before = dict(zip(axes, pads[: len(axes)], strict=True))
    after = dict(zip(axes, pads[len(axes) :], strict=True))
    if any(amounts.get(axis) for axis in (0, 1) for amounts in (before, after)):
        raise Misfit("it pads the batch or the channels")
    return [amounts.get(axis, 0) for amounts in (before, after) for axis in range(2, rank)]


def _pads_by_attribute(pad: ir.Node) -> tuple[list[int], list[int] | None]:
    if pad.attributes.get_float("value", 0.0) != 0:
        raise Misfit("it pads with another number than zero")
    return list(pad.attributes.get_ints("pads", ())), None


def _pads_by_input(pad: ir.Node) -> tuple[list[int], list[int] | None]:
    pads, value, axes = (*pad.inputs[1:], None, None, None)[:3]
    if value is not None:
        number = small_array(value)
        if number is None or number.size != 1:
            raise Misfit("the number that it pads with is not constant")
        if number.item() != 0:
            raise Misfit("it pads with another number than zero")
    return _integers(pads, "its pads"), None if axes is None else _integers(axes, "its axes")


def _integers(value: ir.Value | None, what: str) -> list[int]:
    numbers = small_integers(value)
    if numbers is None:
        raise Misfit(f"{what} are not constant")
    return list(numbers)


def _own(reader: ir.Node, count: int) -> list[int]:
    """The pads that the reader has already."""
    auto_pad = reader.attributes.get_string("auto_pad", "NOTSET")
    if auto_pad not in ("NOTSET", "VALID"):
        raise Misfit(f"{reader.op_type} chooses its pads by the size of its input ({auto_pad})")
    pads = list(reader.attributes.get_ints("pads", ())) if auto_pad == "NOTSET" else []
    if len(pads) not in (0, count):
        raise Misfit(f"{reader.op_type} has {len(pads)} pads, not {count}")
    return pads or [0] * count


def _check_average(pool: ir.Node, pads: list[int], opset: int) -> None:
    """Raise Misfit unless the zeros of a Pad count in the mean as the pool's own pads do."""
    if opset < 7:
        raise Misfit(f"AveragePool of opset {opset} never counts its pads")
    if pool.attributes.get_int("ceil_mode", 0):
        raise Misfit("AveragePool in ceil mode reaches over its pads")
    if not pool.attributes.get_int("count_include_pad", 0) and any(_own(pool, len(pads))):
        raise Misfit("AveragePool leaves its own pads out of the mean")
    kernel = pool.attributes["kernel_shape"].as_ints()
    if any(amount >= size for amount, size in zip(pads, [*kernel, *kernel], strict=True)):
        raise Misfit("AveragePool cannot pad by as much as its kernel")
