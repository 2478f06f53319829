"""The operators of ONNX as functions of torch tensors; see `operator_types`."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.training.operators import (
    arithmetic,
    attention,
    control_flow,
    convolution,
    elementwise,
    generators,
    microsoft,
    microsoft_codes,
    movement,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resampling,
    signal,
)
from graphopt.training.operators.operator_types import Operator, Table

_STANDARD: tuple[Table, ...] = (
    arithmetic.OPERATORS,
    attention.OPERATORS,
    control_flow.OPERATORS,
    convolution.OPERATORS,
    elementwise.OPERATORS,
    generators.OPERATORS,
    movement.OPERATORS,
    normalization.OPERATORS,
    pooling.OPERATORS,
    quantization.OPERATORS,
    recurrent.OPERATORS,
    reduction.OPERATORS,
    resampling.OPERATORS,
    signal.OPERATORS,
)

_MICROSOFT: tuple[Table, ...] = (microsoft.OPERATORS, microsoft_codes.OPERATORS)

OPERATORS: Mapping[tuple[str, str], Operator] = {
    (domain, op_type): operator
    for domain, tables in (("", _STANDARD), ("com.microsoft", _MICROSOFT))
    for table in tables
    for op_type, operator in table.items()
}
"""By domain and operator; ai.onnx is the empty domain."""
