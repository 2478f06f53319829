"""What an operator is here: a function of tensors.

Its positional parameters are the inputs of a node in order, None where one is left out. Its
keyword-only parameters are the attributes by their ONNX names, with their defaults; and of these,
which the interpreter states itself:

    opset             the version of the operators of its domain that the model uses
    input_count       how many inputs the node has, without what its graphs read from around
    input_types       their element types as ONNX numbers them, 0 where one is not known
    output_count      how many outputs it has
    device            where new tensors are made
    straight_through  codes stay floating, and gradients pass where numbers are rounded

Attributes that a later opset made inputs are inputs: `BECAME_INPUTS` says which, of what type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Results = Tensor | tuple[Tensor, ...]
Operator = Callable[..., Results]
Table = Mapping[str, Operator]
"""By operator type."""

Body = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""A graph in an attribute: from its inputs, and what it reads from around it, to its outputs.

What is read from around follows the inputs of the node that has the graph.
"""

STATED = frozenset(
    {"device", "input_count", "input_types", "opset", "output_count", "straight_through"}
)

_INTS, _FLOATS = torch.int64, None
_AXES = {"axes": (1, _INTS)}

BECAME_INPUTS: Mapping[str, Mapping[str, tuple[int, torch.dtype | None]]] = {
    "Clip": {"min": (1, _FLOATS), "max": (2, _FLOATS)},
    "Dropout": {"ratio": (1, _FLOATS)},
    "Pad": {"pads": (1, _INTS), "value": (2, _FLOATS)},
    "Slice": {"starts": (1, _INTS), "ends": (2, _INTS), "axes": (3, _INTS)},
    "Split": {"split": (1, _INTS)},
    "TopK": {"k": (1, _INTS)},
    "Upsample": {"scales": (1, torch.float32)},
    "Squeeze": _AXES,
    "Unsqueeze": _AXES,
    "ReduceL1": _AXES,
    "ReduceL2": _AXES,
    "ReduceLogSum": _AXES,
    "ReduceLogSumExp": _AXES,
    "ReduceMax": _AXES,
    "ReduceMean": _AXES,
    "ReduceMin": _AXES,
    "ReduceProd": _AXES,
    "ReduceSum": _AXES,
    "ReduceSumSquare": _AXES,
}
"""By operator and attribute: the index of the input, and its type; None where it is float.

Numbers of a float attribute take the type of the first input when they meet it.
"""
