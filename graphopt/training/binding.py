"""A node as a function of its inputs: its operator with what the attributes state."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.errors import did_you_mean
from graphopt.operators import ONNX_DOMAINS, attributes_of
from graphopt.rewriting import input_of
from graphopt.training.operators import OPERATORS
from graphopt.training.operators.element_types import BARE_UNSIGNED, TORCH_TYPES, from_onnx
from graphopt.training.operators.operator_types import (
    BECAME_INPUTS,
    STATED,
    Body,
    Operator,
    Results,
)

_STATED_HERE = {"QLinearSoftmax": frozenset({"opset"})}
"""Attributes that are called as what the interpreter states; they take its place."""

_DTYPES = ("dtype", "output_datatype", "output_dtype", "to")
"""Attributes that name an element type."""

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Place:
    """Where a node runs.

    Attributes:
        opsets: the version of each domain.
        device: where its tensors are.
        straight_through: codes stay floating, and gradients pass where numbers are rounded.
        body_of: makes a graph in an attribute of a node callable.
        wide: 16 bits are computed in float32.
    """

    opsets: Mapping[str, int]
    device: torch.device
    straight_through: bool
    body_of: Callable[[ir.Node, ir.Graph], Body]
    wide: bool = False

    def as_computed(self, tensor: Tensor) -> Tensor:
        """The tensor as it is computed with here."""
        return tensor.float() if self.wide and tensor.dtype in _HALVES else tensor


def operator_of(node: ir.Node) -> Operator | None:
    """The operator of a node; None where there is none here."""
    domain = "" if node.domain in ONNX_DOMAINS else node.domain
    return OPERATORS.get((domain, node.op_type))


def why_not(node: ir.Node) -> str | None:
    """Why a node cannot be computed here, or None where it can."""
    operator = operator_of(node)
    if operator is None:
        return "there is no such operator here"
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    for value in values:
        if value.dtype not in (None, ir.DataType.UNDEFINED) and value.dtype not in TORCH_TYPES:
            return f"{value.name!r} is of {value.dtype.name}"
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return f"{value.name!r} is no tensor"
    for attribute in attributes_of(node):
        if attribute.name in _DTYPES and ir.DataType(attribute.as_int()) not in TORCH_TYPES:
            return f"{attribute.name} is {ir.DataType(attribute.as_int()).name}"
        if attribute.name not in _known(node, operator) and _means_something(node, attribute.name):
            hint = did_you_mean(attribute.name, _attributes(operator))
            return f"it has no attribute {attribute.name!r} here{hint}"
    return None


def _known(node: ir.Node, operator: Operator) -> frozenset[str]:
    inputs = frozenset(BECAME_INPUTS.get(node.op_type, ()))
    return _attributes(operator) | inputs | _STATED_HERE.get(node.op_type, frozenset())


def _means_something(node: ir.Node, name: str) -> bool:
    """Some version of the operator has the attribute; what none has, onnxruntime ignores."""
    return node.domain not in ONNX_DOMAINS or name in _of_any_version()[node.op_type]


@cache
def _of_any_version() -> Mapping[str, frozenset[str]]:
    """The attributes of the standard operators, of all their versions, by operator."""
    found: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain in ONNX_DOMAINS:
            found[schema.name] |= frozenset(schema.attributes)
    return found


@cache
def _parameters(operator: Operator) -> frozenset[str]:
    """The names of its keyword-only parameters."""
    if inspect.isbuiltin(operator):
        return frozenset()
    parameters = inspect.signature(operator).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def _attributes(operator: Operator) -> frozenset[str]:
    return _parameters(operator) - STATED


def bound(node: ir.Node, place: Place) -> Callable[..., Results]:
    """A node as a function of its inputs.

    Args:
        node: one that `why_not` has nothing against.
        place: where it runs.

    Raises:
        ModelError: a tensor in an attribute is of a type that is not computed in here.
    """
    operator = operator_of(node)
    assert operator is not None
    accepted = _parameters(operator)
    stated: dict[str, Any] = {
        "device": place.device,
        "input_count": len(node.inputs),
        "input_types": [_type_of(value) for value in node.inputs],
        "opset": place.opsets.get("" if node.domain in ONNX_DOMAINS else node.domain, 1),
        "output_count": _output_count(node),
        "straight_through": place.straight_through,
    }
    for attribute in attributes_of(node):
        stated[attribute.name] = _content(node, attribute, place)
    kept = {name: content for name, content in stated.items() if name in accepted}
    return _with_inputs_of_old(node, place, partial(operator, **kept) if kept else operator)


def _type_of(value: ir.Value | None) -> int:
    return 0 if value is None or value.dtype is None else int(value.dtype)


def _output_count(node: ir.Node) -> int:
    """Up to the last output that has a name."""
    return max((i + 1 for i, output in enumerate(node.outputs) if output.name), default=0)


def _content(node: ir.Node, attribute: ir.Attr, place: Place) -> Any:
    if attribute.type is ir.AttributeType.TENSOR:
        return place.as_computed(from_onnx(attribute.as_tensor(), place.device))
    if attribute.type is ir.AttributeType.GRAPH:
        return place.body_of(node, attribute.as_graph())
    if place.wide and attribute.name in _DTYPES and TORCH_TYPES.get(attribute.value) in _HALVES:
        return int(ir.DataType.FLOAT)
    return attribute.value


def _with_inputs_of_old(node: ir.Node, place: Place, kernel: Operator) -> Operator:
    """Attributes that are inputs to the operator are given as these."""
    old = BECAME_INPUTS.get(node.op_type, {})
    given = {
        index: (node.attributes[name].value, dtype)
        for name, (index, dtype) in old.items()
        if name in node.attributes and input_of(node, index) is None
    }
    if not given:
        return kernel
    count = max(max(given) + 1, len(node.inputs))
    fixed = {i: torch.tensor(v, dtype=d, device=place.device) for i, (v, d) in given.items()}

    def with_inputs(*inputs: Tensor | None) -> Results:
        filled = [*inputs, *[None] * (count - len(inputs))]
        for index, tensor in fixed.items():
            filled[index] = tensor
        return kernel(*filled)

    return with_inputs


def widened(node: ir.Node, kernel: Callable[..., Results], inputs: list[Tensor | None]) -> Results:
    """Run a node whose inputs are of unsigned types that torch has next to no kernels for.

    They are computed in int64 and wrapped: sums and products are right in all bits. Comparisons and
    quotients of numbers from 2**63 on are not.
    """
    kind = next(x.dtype for x in inputs if x is not None and x.dtype in BARE_UNSIGNED)
    wide = [x.to(torch.int64) if x is not None and x.dtype in BARE_UNSIGNED else x for x in inputs]
    results = kernel(*wide)
    is_single = isinstance(results, Tensor)
    outputs = (results,) if isinstance(results, Tensor) else results
    outputs = tuple(
        y.to(kind) if y.dtype == torch.int64 and _is_of_input_type(node, index) else y
        for index, y in enumerate(outputs)
    )
    return outputs[0] if is_single else outputs


def _is_of_input_type(node: ir.Node, index: int) -> bool:
    """The output of a standard operator has the type of one of its inputs; a shape has not."""
    if node.domain not in ONNX_DOMAINS:
        return False
    schema = onnx.defs.get_schema(node.op_type)
    # The last one may stand for many.
    output = schema.outputs[min(index, len(schema.outputs) - 1)]
    return output.type_str in {parameter.type_str for parameter in schema.inputs}
